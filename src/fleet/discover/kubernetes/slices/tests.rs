//! Which engines follow from slices, in the form in which the API server writes them.

use serde_json::{Value, json};

use super::*;

fn slice(value: Value) -> EndpointSlice {
    serde_json::from_value(value).expect("is a slice")
}

fn store(slices: impl IntoIterator<Item = Value>) -> SliceStore {
    let mut store = SliceStore::default();
    for value in slices {
        store.put(slice(value)).expect("there is room");
    }
    store
}

/// A slice with one port and these endpoints.
fn of(name: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {"name": name, "resourceVersion": "7"},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

/// An endpoint in all its detail.
fn pod(name: &str, address: &str, conditions: Value) -> Value {
    json!({
        "addresses": [address, "10.9.9.9"],
        "conditions": conditions,
        "targetRef": {"kind": "Pod", "name": name, "namespace": "default", "uid": "u"},
        "nodeName": "node-1",
        "zone": "zone-1",
        "hints": {"forZones": [{"name": "zone-2"}]},
    })
}

fn ready(name: &str, address: &str) -> Value {
    pod(name, address, json!({"ready": true, "serving": true, "terminating": false}))
}

fn service() -> KubernetesService {
    KubernetesService::new("vllm")
}

fn at_port(port: &str) -> KubernetesService {
    KubernetesService { port: Some(port.into()), ..service() }
}

/// Names and URLs of the engines.
fn engines(store: &SliceStore, service: &KubernetesService) -> Vec<String> {
    let found = store.read(service).expect("the slices can be used");
    found.engines.iter().map(|engine| format!("{} {}", engine.name, engine.url.display())).collect()
}

#[test]
fn lists_ready_endpoints_in_the_order_of_their_addresses() {
    let slices = [
        of("b", json!([ready("p-2", "10.0.0.2")])),
        of("a", json!([ready("p-3", "10.0.0.3"), ready("p-1", "10.0.0.1")])),
    ];
    let wanted = ["p-1 http://10.0.0.1:8000", "p-2 http://10.0.0.2:8000", "p-3 http://10.0.0.3:8000"];
    assert_eq!(engines(&store(slices), &service()), wanted);
}

#[test]
fn reads_the_conditions_of_an_endpoint() {
    for (conditions, state) in [
        (json!({"ready": true, "serving": true, "terminating": false}), EndpointState::Ready),
        (json!({}), EndpointState::Ready),
        (json!(null), EndpointState::Ready),
        (json!({"ready": null}), EndpointState::Ready),
        (json!({"ready": false, "serving": false, "terminating": false}), EndpointState::Unready),
        (json!({"ready": false}), EndpointState::Unready),
        (json!({"ready": false, "serving": true, "terminating": true}), EndpointState::Leaving),
        (json!({"ready": false, "serving": false, "terminating": true}), EndpointState::Leaving),
        // The service publishes addresses that are not ready.
        (json!({"ready": true, "serving": true, "terminating": true}), EndpointState::Leaving),
    ] {
        let found = store([of("a", json!([pod("p", "10.0.0.1", conditions.clone())]))]).read(&service());
        let found = found.expect("the slices can be used");
        let counts = (found.engines.len(), found.unready, found.leaving);
        let wanted = match state {
            EndpointState::Ready => (1, 0, 0),
            EndpointState::Unready => (0, 1, 0),
            EndpointState::Leaving => (0, 0, 1),
        };
        assert_eq!(counts, wanted, "{conditions}");
    }
    let mut bare = of("a", json!([{"addresses": ["10.0.0.1"]}]));
    assert_eq!(engines(&store([bare.clone()]), &service()), ["10.0.0.1:8000 http://10.0.0.1:8000"]);
    bare["endpoints"] = Value::Null;
    assert_eq!(engines(&store([bare]), &service()), Vec::<String>::new());
}

#[test]
fn counts_an_endpoint_in_two_slices_once_in_its_best_state() {
    let unready = pod("p-1", "10.0.0.1", json!({"ready": false}));
    for pair in [[unready.clone(), ready("p-1", "10.0.0.1")], [ready("p-1", "10.0.0.1"), unready]] {
        let [one, other] = pair;
        let store = store([of("a", json!([one])), of("b", json!([other]))]);
        assert_eq!(engines(&store, &service()), ["p-1 http://10.0.0.1:8000"]);
    }
}

#[test]
fn counts_a_pod_with_addresses_of_both_families_once() {
    let six = |conditions: Value| {
        let mut six = of("six", json!([pod("p-1", "fd00::1", conditions)]));
        six["addressType"] = "IPv6".into();
        six
    };
    let up = || json!({"ready": true});
    assert_eq!(engines(&store([six(up())]), &service()), ["p-1 http://[fd00::1]:8000"]);
    let both = store([six(up()), of("four", json!([ready("p-1", "10.0.0.1")]))]);
    assert_eq!(engines(&both, &service()), ["p-1 http://10.0.0.1:8000"]);
    // The slice of one family has changed and the other has not: the engine does not move for a moment.
    let leaving = json!([pod("p-1", "10.0.0.1", json!({"ready": false, "terminating": true}))]);
    let halfway = store([six(up()), of("four", leaving)]).read(&service()).expect("the slices can be used");
    assert_eq!((halfway.engines.len(), halfway.leaving), (0, 1));
}

#[test]
fn names_an_engine_by_its_pod_where_the_name_says_which() {
    // A pod of a stateful set is replaced by one of its name.
    let leaving = pod("p-0", "10.0.0.1", json!({"ready": false, "terminating": true}));
    let store_of = |endpoints: Value| store([of("a", endpoints)]);
    let replaced = store_of(json!([leaving, ready("p-0", "10.0.0.2")]));
    assert_eq!(engines(&replaced, &service()), ["p-0 http://10.0.0.2:8000"]);
    let twice =
        store_of(json!([ready("p-0", "10.0.0.1"), ready("p-0", "10.0.0.2"), ready("p-1", "10.0.0.3")]));
    let wanted = [
        "10.0.0.1:8000 http://10.0.0.1:8000",
        "10.0.0.2:8000 http://10.0.0.2:8000",
        "p-1 http://10.0.0.3:8000",
    ];
    assert_eq!(engines(&twice, &service()), wanted);
    let mut node = ready("n", "10.0.0.1");
    node["targetRef"]["kind"] = "Node".into();
    assert_eq!(engines(&store_of(json!([node])), &service()), ["10.0.0.1:8000 http://10.0.0.1:8000"]);
}

#[test]
fn takes_the_port_that_is_configured_or_the_only_one() {
    let with = |ports: Value| {
        let mut slice = of("a", json!([ready("p", "10.0.0.1")]));
        slice["ports"] = ports;
        store([slice])
    };
    let two = json!([{"name": "metrics", "port": 9000}, {"name": "http", "port": 8000}]);
    let other = json!([{"name": "metrics", "port": 9000}, {"name": "api", "port": 8000}]);
    for (ports, service, wanted) in [
        (json!([{"name": "", "port": 7000}]), service(), Ok("p http://10.0.0.1:7000")),
        (two.clone(), service(), Ok("p http://10.0.0.1:8000")),
        (two.clone(), at_port("metrics"), Ok("p http://10.0.0.1:9000")),
        (two.clone(), at_port("9000"), Ok("p http://10.0.0.1:9000")),
        (other.clone(), at_port("api"), Ok("p http://10.0.0.1:8000")),
        (json!(null), at_port("8000"), Ok("p http://10.0.0.1:8000")),
        (json!([{"name": "https", "port": 8443}]), service(), Ok("p https://10.0.0.1:8443")),
        (json!([{"name": "x", "port": 1, "appProtocol": "https"}]), service(), Ok("p https://10.0.0.1:1")),
        (json!([{"name": "https", "port": 1, "appProtocol": "http"}]), service(), Ok("p http://10.0.0.1:1")),
        (
            other.clone(),
            service(),
            Err("several ports, set kubernetes.port: they have metrics 9000, api 8000"),
        ),
        (two.clone(), at_port("web"), Err("the pods have no port web: they have metrics 9000, http 8000")),
        (two.clone(), at_port("80"), Err("the pods have no port 80: they have metrics 9000, http 8000")),
        (json!([]), service(), Err("the pods have no port: they have none")),
        (json!([{"name": "http"}]), service(), Err("the pods have no port: they have http any")),
    ] {
        let read = with(ports.clone()).read(&service);
        match (read, wanted) {
            (Ok(_), Ok(wanted)) => assert_eq!(engines(&with(ports), &service), [wanted]),
            (Err(why), Err(wanted)) => assert!(why.ends_with(wanted), "{why}"),
            (read, wanted) => panic!("{ports}: {read:?} in place of {wanted:?}"),
        }
    }
    // Without endpoints a service that was scaled to zero has no ports, which is no mistake.
    let mut empty = of("a", json!([]));
    empty["ports"] = json!([]);
    assert_eq!(engines(&store([empty]), &at_port("web")), Vec::<String>::new());
}

#[test]
fn leaves_out_addresses_that_are_none() {
    let endpoints = json!([
        ready("a", "10.0.0.1/x"),
        ready("b", "u:p@10.0.0.1"),
        ready("c", ""),
        {"addresses": []},
        {"addresses": null},
        ready("d", "10.0.0.4"),
    ]);
    assert_eq!(engines(&store([of("a", endpoints)]), &service()), ["d http://10.0.0.4:8000"]);
}

/// Regression: names were taken for addresses, and each of them for one engine.
#[test]
fn leaves_out_slices_and_addresses_of_names() {
    let named = |address_type: &str, conditions: Value| {
        let mut slice = of("names", json!([pod("p", "gpu.example.com", conditions)]));
        slice["addressType"] = address_type.into();
        slice
    };
    let up = || json!({"ready": true});
    let addressed = of("a", json!([ready("q", "10.0.0.1"), ready("r", "gpu-1")]));
    for (address_type, unaddressed) in [("FQDN", 1), ("", 1), ("IPv4", 0)] {
        let store = store([named(address_type, up()), addressed.clone()]);
        assert_eq!(engines(&store, &service()), ["q http://10.0.0.1:8000"]);
        let found = store.read(&service()).expect("the slices can be used");
        assert_eq!(found.unaddressed, unaddressed, "{address_type:?}");
    }
    let alone = store([named("FQDN", up())]).read(&at_port("web")).expect("no port is missing");
    let why = alone.why_empty(&service());
    assert_eq!(why, "no endpoint is ready: 0 not ready, 0 terminating, 1 without IP addresses");
    // The address of a type may be written in several forms, which are one engine.
    let mut six = of("six", json!([ready("a", "fd00::1"), ready("b", "fd00:0:0::1")]));
    six["addressType"] = "IPv6".into();
    assert_eq!(engines(&store([six]), &service()).len(), 1);
}

/// Logs, metrics and admin calls carry the name, which any writer of slices chooses.
#[test]
fn an_endpoint_without_the_name_of_a_pod_has_its_address_for_a_name() {
    let long = "p".repeat(MAX_POD_NAME_BYTES + 1);
    for (name, wanted) in [
        ("vllm-0", "vllm-0"),
        ("all", "10.0.0.1:8000"),
        ("a\nb", "10.0.0.1:8000"),
        ("../drain", "10.0.0.1:8000"),
        (&long, "10.0.0.1:8000"),
    ] {
        let found = engines(&store([of("a", json!([ready(name, "10.0.0.1")]))]), &service());
        assert_eq!(found, [format!("{wanted} http://10.0.0.1:8000")]);
    }
}

#[test]
fn reads_the_model_from_an_annotation_or_a_label() {
    let service = KubernetesService { model_label: Some("team/model".into()), ..service() };
    for (annotations, labels, wanted) in [
        (json!({"team/model": "Qwen/Qwen3-8B"}), json!({"team/model": "qwen"}), Some("Qwen/Qwen3-8B")),
        (json!({"other": "x"}), json!({"team/model": "qwen"}), Some("qwen")),
        (json!(null), json!({"other": "x"}), None),
        (json!(null), json!({"team/model": " "}), None),
        (json!({"team/model": "a\nb"}), json!(null), None),
        (json!({"team/model": "m".repeat(MAX_VALUE_BYTES + 1)}), json!(null), None),
    ] {
        let mut slice = of("a", json!([ready("p", "10.0.0.1")]));
        slice["metadata"]["annotations"] = annotations;
        slice["metadata"]["labels"] = labels;
        let found = store([slice]).read(&service).expect("the slices can be used");
        assert_eq!(found.engines[0].model.as_deref(), wanted);
    }
}

#[test]
fn leaves_engines_of_the_role_prefill_out() {
    let service = KubernetesService { role_label: Some("llm-d.ai/role".into()), ..service() };
    let with_role = |name: &str, address: &str, role: &str| {
        let mut slice = of(name, json!([ready(name, address)]));
        slice["metadata"]["annotations"] = json!({"llm-d.ai/role": role});
        slice
    };
    let both = || store([with_role("p", "10.0.0.1", "prefill"), with_role("d", "10.0.0.2", "decode")]);
    assert_eq!(engines(&both(), &service), ["d http://10.0.0.2:8000"]);
    let unlabelled = KubernetesService { role_label: None, ..service.clone() };
    assert_eq!(engines(&both(), &unlabelled).len(), 2);
    let found =
        store([with_role("p", "10.0.0.1", "prefill")]).read(&service).expect("the slices can be used");
    assert_eq!(found.engines, []);
    let why = found.why_empty(&service);
    assert!(why.ends_with("0 terminating, 1 of the role prefill"), "{why}");
}

#[test]
fn holds_a_bounded_number_of_slices_and_engines() {
    let mut full = store((0..MAX_SLICES).map(|number| of(&format!("s-{number}"), json!([]))));
    let again = full.put(slice(of("s-0", json!([ready("p", "10.0.0.1")]))));
    assert_eq!(again, Ok(()), "one of the names is replaced");
    let why = full.put(slice(of("more", json!([])))).expect_err("there is no room");
    assert!(why.contains("1024 slices"), "{why}");
    full.delete("s-1");
    assert_eq!(full.put(slice(of("more", json!([])))), Ok(()));
    let endpoint = |n: usize| ready(&format!("p-{n}"), &format!("10.0.{}.{}", n / 250, n % 250));
    let many = |count: usize| {
        let numbers: Vec<usize> = (0..count).collect();
        let parts = numbers.chunks(MAX_SLICE_ENDPOINTS).enumerate();
        let slices = parts
            .map(|(part, numbers)| of(&format!("s-{part}"), numbers.iter().map(|n| endpoint(*n)).collect()));
        store(slices).read(&service())
    };
    assert_eq!(many(MAX_SERVICE_ENGINES).map(|found| found.engines.len()), Ok(MAX_SERVICE_ENGINES));
    assert!(many(MAX_SERVICE_ENGINES + 1).is_err_and(|why| why.contains("1025 engines")));
}

/// Regression: the number of endpoints had no limit while few of them were ready.
#[test]
fn holds_a_bounded_number_of_endpoints() {
    let filled = |name: &str, count: usize| {
        let endpoint = |n: usize| pod("p", &format!("10.0.{}.{}", n / 250, n % 250), json!({"ready": false}));
        slice(of(name, (0..count).map(endpoint).collect()))
    };
    let mut some = SliceStore::default();
    assert_eq!(some.put(filled("a", MAX_SLICE_ENDPOINTS)), Ok(()));
    let why = some.put(filled("b", MAX_SLICE_ENDPOINTS + 1)).expect_err("the slice is too large");
    assert_eq!(why, "the slice b has 1001 endpoints: 1000 is the most");
    let whole = MAX_SERVICE_ENDPOINTS / MAX_SLICE_ENDPOINTS;
    for number in 1..whole {
        assert_eq!(some.put(filled(&format!("s-{number}"), MAX_SLICE_ENDPOINTS)), Ok(()));
    }
    assert_eq!(some.put(filled("a", MAX_SLICE_ENDPOINTS)), Ok(()), "one of the names is replaced");
    let why = some.put(filled("last", MAX_SLICE_ENDPOINTS)).expect_err("there is no room");
    assert_eq!(why, "the service has 9000 endpoints: 8192 is the most");
    assert_eq!(some.put(filled("last", MAX_SERVICE_ENDPOINTS % MAX_SLICE_ENDPOINTS)), Ok(()));
    some.delete("a");
    assert_eq!(some.put(filled("other", MAX_SLICE_ENDPOINTS)), Ok(()));
}
