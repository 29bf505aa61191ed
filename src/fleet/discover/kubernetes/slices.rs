//! Folds the EndpointSlices of one service into the list of its engines. Pure: slices in, engines out.
//!
//! ```text
//! conditions of an endpoint           the engine
//! terminating                         leaves: no new requests, those in flight end
//! ready: true or null                 listed
//! ready: false                        not listed
//! ```
//!
//! An endpoint that terminates leaves whether it serves or not: its pod has been told to stop. `ready` is
//! true for such an endpoint where the service publishes addresses that are not ready, so `terminating` is
//! read first. Zones and hints are not read: a session stays with its engine wherever the balancer runs.
//!
//! One engine may be listed several times: an endpoint moves from one slice to another and is in both for a
//! moment, and a service with two address families has a slice of each. Of the states of one address the best
//! counts; of the addresses of one pod the IPv4 one.
//!
//! Slices of names (`addressType: FQDN`, deprecated) are left out: a name may have many engines, and leads
//! where a DNS server says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde::Deserialize;

use crate::config::types::{ALL_UPSTREAMS, KubernetesService};
use crate::config::url::{self, UpstreamUrl};
use crate::config::values::plain;

/// The label by which the slices of a service are found.
pub(super) const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The role of engines that compute prefills for others, and take no requests from clients.
const PREFILL_ROLE: &str = "prefill";

/// The largest number of slices of one service.
const MAX_SLICES: usize = 1024;

/// The largest number of engines that one service may list.
const MAX_SERVICE_ENGINES: usize = 1024;

/// The largest number of endpoints of one slice. The API server accepts no more.
const MAX_SLICE_ENDPOINTS: usize = 1000;

/// The largest number of endpoints of one service, in whatever state. A pod has several while it moves from
/// one slice to another, is replaced, or has addresses of two families.
const MAX_SERVICE_ENDPOINTS: usize = 8 * MAX_SERVICE_ENGINES;

/// The types of addresses that are read.
const ADDRESS_TYPES: [&str; 2] = ["IPv4", "IPv6"];

/// The longest name of a pod, in bytes.
const MAX_POD_NAME_BYTES: usize = 253;

/// The longest name of a model, in bytes.
const MAX_VALUE_BYTES: usize = 1024;

/// The port that is taken where a service has several and the configuration names none.
const DEFAULT_PORT_NAME: &str = "http";

/// An EndpointSlice, with the fields that discovery reads.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    pub(super) metadata: SliceMetadata,
    #[serde(default)]
    address_type: String,
    endpoints: Option<Vec<SliceEndpoint>>,
    ports: Option<Vec<SlicePort>>,
}

/// The metadata of an object of the API server.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(super) struct SliceMetadata {
    pub(super) name: String,
    #[serde(default)]
    pub(super) resource_version: String,
    namespace: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint {
    addresses: Option<Vec<String>>,
    #[serde(default)]
    conditions: Option<EndpointConditions>,
    target_ref: Option<EndpointTarget>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
struct EndpointConditions {
    ready: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
struct EndpointTarget {
    kind: Option<String>,
    name: Option<String>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct SlicePort {
    name: Option<String>,
    port: Option<u16>,
    app_protocol: Option<String>,
}

/// What an endpoint is for new requests; the greater of two states counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum EndpointState {
    Unready,
    Leaving,
    Ready,
}

/// An engine of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SliceEngine {
    /// The name of the pod, or the address where several engines have it or none.
    pub(super) name: String,
    pub(super) url: UpstreamUrl,
    pub(super) model: Option<String>,
    /// The name of the service, which certificates are made for; `None` without TLS.
    pub(super) host: Option<String>,
}

/// The engines of a service, and what else its slices list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceEndpoints {
    pub(super) engines: Vec<SliceEngine>,
    pub(super) slices: usize,
    /// The number of endpoints that are not ready.
    pub(super) unready: usize,
    /// The number of endpoints that terminate.
    pub(super) leaving: usize,
    /// The number of endpoints of engines that compute prefills for others.
    pub(super) prefill: usize,
    /// The number of endpoints in slices of other addresses than IPv4 and IPv6.
    pub(super) unaddressed: usize,
}

/// The slices of one service by their names.
#[derive(Debug, Default)]
pub(super) struct SliceStore {
    slices: BTreeMap<String, EndpointSlice>,
}

/// An endpoint at one address.
struct AddressedEndpoint<'a> {
    url: UpstreamUrl,
    family: &'a str,
    pod: Option<&'a str>,
    state: EndpointState,
    model: Option<&'a str>,
}

// === impl SliceStore ===

impl SliceStore {
    /// Adds a slice, or replaces the one of its name.
    pub(super) fn put(&mut self, slice: EndpointSlice) -> Result<(), String> {
        if self.slices.len() >= MAX_SLICES && !self.slices.contains_key(&slice.metadata.name) {
            return Err(format!("the service has more than {MAX_SLICES} slices"));
        }
        let count = slice.endpoint_count();
        if count > MAX_SLICE_ENDPOINTS {
            let name = &slice.metadata.name;
            return Err(format!("the slice {name} has {count} endpoints: {MAX_SLICE_ENDPOINTS} is the most"));
        }
        let others = self.slices.iter().filter(|(name, _)| **name != slice.metadata.name);
        let all = count + others.map(|(_, slice)| slice.endpoint_count()).sum::<usize>();
        if all > MAX_SERVICE_ENDPOINTS {
            return Err(format!("the service has {all} endpoints: {MAX_SERVICE_ENDPOINTS} is the most"));
        }
        self.slices.insert(slice.metadata.name.clone(), slice);
        Ok(())
    }

    /// Removes the slice of this name.
    pub(super) fn delete(&mut self, name: &str) {
        self.slices.remove(name);
    }

    /// Returns the engines in the order of their addresses, or why the slices cannot be used.
    pub(super) fn read(&self, service: &KubernetesService) -> Result<ServiceEndpoints, String> {
        let mut found: BTreeMap<UpstreamUrl, AddressedEndpoint<'_>> = BTreeMap::new();
        let (mut has_port, mut prefill, mut unaddressed) = (false, 0, 0);
        for slice in self.slices.values() {
            if !slice.has_addresses() {
                unaddressed += slice.endpoint_count();
                continue;
            }
            let Some((port, https)) = slice.port(service.port.as_deref())? else { continue };
            has_port = true;
            let role = service.role_label.as_ref().and_then(|label| slice.metadata.value(label));
            if role == Some(PREFILL_ROLE) {
                prefill += slice.endpoint_count();
                continue;
            }
            let model = service.model_label.as_ref().and_then(|label| slice.metadata.value(label));
            for endpoint in slice.endpoints.iter().flatten() {
                let Some(endpoint) = endpoint.at(port, https, &slice.address_type, model) else { continue };
                let known = found.get(&endpoint.url).is_some_and(|known| known.state >= endpoint.state);
                if !known {
                    found.insert(endpoint.url.clone(), endpoint);
                }
            }
        }
        if !has_port && let Some(why) = self.without_port(service.port.as_deref()) {
            return Err(why);
        }
        let found: Vec<AddressedEndpoint<'_>> = one_per_pod(found.into_values().collect());
        let count = |state: EndpointState| found.iter().filter(|endpoint| endpoint.state == state).count();
        let listed = count(EndpointState::Ready);
        if listed > MAX_SERVICE_ENGINES {
            return Err(format!("the service has {listed} engines: {MAX_SERVICE_ENGINES} is the most"));
        }
        Ok(ServiceEndpoints {
            slices: self.slices.len(),
            unready: count(EndpointState::Unready),
            leaving: count(EndpointState::Leaving),
            prefill,
            unaddressed,
            engines: named(&found, &self.host(service)),
        })
    }

    /// The name of the service in the cluster.
    fn host(&self, service: &KubernetesService) -> String {
        let namespace = self.slices.values().find_map(|slice| slice.metadata.namespace.as_deref());
        match namespace {
            Some(namespace) => format!("{}.{namespace}.svc", service.service),
            None => service.service.clone(),
        }
    }

    /// Says that slices with endpoints lack the port; `None` where no slice has an endpoint.
    fn without_port(&self, wanted: Option<&str>) -> Option<String> {
        let filled = |slice: &&EndpointSlice| slice.has_addresses() && slice.endpoint_count() > 0;
        let slice = self.slices.values().find(filled)?;
        let ports = slice.ports_text();
        Some(match wanted {
            Some(port) => format!("the pods have no port {port}: {ports}"),
            None => format!("the pods have no port: {ports}"),
        })
    }
}

// === impl SliceMetadata ===

impl SliceMetadata {
    /// The annotation of this name, or else the label. Kubernetes copies the labels of a service; names of
    /// models have characters that only annotations hold.
    fn value(&self, name: &str) -> Option<&str> {
        let annotation = self.annotations.as_ref().and_then(|annotations| annotations.get(name));
        let label = || self.labels.as_ref().and_then(|labels| labels.get(name));
        let value = annotation.or_else(label)?.trim();
        Some(value).filter(|value| value.len() <= MAX_VALUE_BYTES && plain(value).is_ok())
    }
}

// === impl EndpointSlice ===

impl EndpointSlice {
    fn endpoint_count(&self) -> usize {
        self.endpoints.as_ref().map_or(0, Vec::len)
    }

    fn has_addresses(&self) -> bool {
        ADDRESS_TYPES.contains(&self.address_type.as_str())
    }

    /// Returns the number of the port and whether it has TLS; `None` where the slice lacks the port.
    fn port(&self, wanted: Option<&str>) -> Result<Option<(u16, bool)>, String> {
        let ports = self.ports.as_deref().unwrap_or_default();
        let is_named = |port: &&SlicePort, name: &str| port.name.as_deref() == Some(name);
        let number = wanted.and_then(|wanted| wanted.parse::<u16>().ok());
        let found = match (wanted, ports) {
            // A headless service may have no port.
            (Some(_), []) => return Ok(number.map(|number| (number, false))),
            (Some(name), _) => {
                ports.iter().find(|port| is_named(port, name) || number.is_some() && port.port == number)
            }
            (None, [only]) => Some(only),
            (None, []) => None,
            (None, _) => match ports.iter().find(|port| is_named(port, DEFAULT_PORT_NAME)) {
                Some(port) => Some(port),
                None => {
                    let ports = self.ports_text();
                    return Err(format!("the pods have several ports, set kubernetes.port: {ports}"));
                }
            },
        };
        Ok(found.and_then(|port| Some((port.port.filter(|number| *number > 0)?, port.has_tls()))))
    }

    fn ports_text(&self) -> String {
        let text = |port: &SlicePort| {
            let number = port.port.map_or("any".into(), |number| number.to_string());
            format!("{} {number}", port.name.as_deref().unwrap_or_default()).trim().to_string()
        };
        let ports: Vec<String> = self.ports.iter().flatten().map(text).collect();
        if ports.is_empty() { "they have none".into() } else { format!("they have {}", ports.join(", ")) }
    }
}

// === impl SlicePort ===

impl SlicePort {
    fn has_tls(&self) -> bool {
        let is_https = |text: &Option<String>| text.as_deref().is_some_and(|text| text == "https");
        is_https(&self.app_protocol) || self.app_protocol.is_none() && is_https(&self.name)
    }
}

// === impl SliceEndpoint ===

impl SliceEndpoint {
    fn state(&self) -> EndpointState {
        let conditions = self.conditions.unwrap_or_default();
        match (conditions.terminating, conditions.ready) {
            (Some(true), _) => EndpointState::Leaving,
            (_, Some(false)) => EndpointState::Unready,
            _ => EndpointState::Ready,
        }
    }

    /// Addresses the endpoint. Only the first of several addresses is defined to be used. `None` without a
    /// valid address.
    fn at<'a>(
        &'a self,
        port: u16,
        https: bool,
        family: &'a str,
        model: Option<&'a str>,
    ) -> Option<AddressedEndpoint<'a>> {
        let address: IpAddr = self.addresses.as_ref()?.first()?.parse().ok()?;
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let scheme = if https { "https" } else { "http" };
        let url = url::upstream(&format!("{scheme}://{host}:{port}")).ok()?;
        let target = self.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        let pod = target.and_then(|target| target.name.as_deref()).filter(|name| is_pod_name(name));
        Some(AddressedEndpoint { url, family, pod, state: self.state(), model })
    }
}

// === impl ServiceEndpoints ===

impl ServiceEndpoints {
    /// Says why a list has no engine.
    pub(super) fn why_empty(&self, service: &KubernetesService) -> String {
        if self.slices == 0 {
            return format!(
                "no EndpointSlice has the label {SERVICE_LABEL}={}: is there such a service in the namespace",
                service.service
            );
        }
        let ServiceEndpoints { unready, leaving, prefill, unaddressed, .. } = self;
        let mut text = format!("no endpoint is ready: {unready} not ready, {leaving} terminating");
        if *prefill > 0 {
            text.push_str(&format!(", {prefill} of the role {PREFILL_ROLE}"));
        }
        if *unaddressed > 0 {
            text.push_str(&format!(", {unaddressed} without IP addresses"));
        }
        text
    }
}

/// Whether this is a name that Kubernetes gives to pods. A writer of slices can name anything.
fn is_pod_name(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    (1..=MAX_POD_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_part) && name != ALL_UPSTREAMS
}

/// Returns one endpoint of each pod. The slices of two address families change one after the other, so the
/// family is chosen first, and the state does not move an engine to its other address. Of one family a pod
/// has two addresses while it is replaced by one of its name. Two in the same state are kept: the name says
/// too little.
fn one_per_pod(found: Vec<AddressedEndpoint<'_>>) -> Vec<AddressedEndpoint<'_>> {
    // The names of the families sort as wanted.
    let rank = |endpoint: &AddressedEndpoint<'_>| (Reverse(endpoint.family.to_string()), endpoint.state);
    let mut best = HashMap::new();
    for endpoint in &found {
        let Some(pod) = endpoint.pod else { continue };
        let known = best.entry(pod).or_insert_with(|| rank(endpoint));
        *known = rank(endpoint).max(known.clone());
    }
    let is_best = |endpoint: &AddressedEndpoint<'_>| {
        endpoint.pod.and_then(|pod| best.get(pod)).is_none_or(|best| *best == rank(endpoint))
    };
    found.into_iter().filter(is_best).collect()
}

/// Names the endpoints that are ready: by their pods, or by their addresses where a pod has several.
fn named(found: &[AddressedEndpoint<'_>], host: &str) -> Vec<SliceEngine> {
    let ready = || found.iter().filter(|endpoint| endpoint.state == EndpointState::Ready);
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for pod in ready().filter_map(|endpoint| endpoint.pod) {
        *uses.entry(pod).or_default() += 1;
    }
    let name = |endpoint: &AddressedEndpoint<'_>| match endpoint.pod {
        Some(pod) if uses.get(pod) == Some(&1) => pod.to_string(),
        _ => endpoint.url.authority(),
    };
    let engine = |endpoint: &AddressedEndpoint<'_>| SliceEngine {
        name: name(endpoint),
        url: endpoint.url.clone(),
        model: endpoint.model.map(String::from),
        host: endpoint.url.https.then(|| host.to_string()),
    };
    ready().map(engine).collect()
}

#[cfg(test)]
mod tests;
