//! A source of upstreams by a Kubernetes service: each endpoint of the service is an upstream.

use std::path::PathBuf;

use super::dns_name::kubernetes_name;
use crate::config::setting::{SettingRow, SettingsTable, maybe, path, row, text, value};
use crate::config::values::plain;

/// A service in Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesService {
    pub service: String,
    /// `None`: the namespace that the balancer runs in.
    pub namespace: Option<String>,
    /// The name or number of the port of the pods; `None`: the only one, or the one that is named `http`.
    pub port: Option<String>,
    /// The label of the service that holds the name of the model.
    pub model_label: Option<String>,
    /// The label of the service that holds the role of its engines.
    pub role_label: Option<String>,
    /// The file with the address and the credentials; `None`: `$KUBECONFIG`, or the account of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig; `None`: its current one.
    pub context: Option<String>,
}

// === impl KubernetesService ===

impl KubernetesService {
    /// A service with every option at its default.
    pub fn new(service: &str) -> Self {
        let service = service.to_string();
        KubernetesService {
            service,
            namespace: None,
            port: None,
            model_label: None,
            role_label: None,
            kubeconfig: None,
            context: None,
        }
    }

    /// The service as logs and metrics name it.
    pub fn display(&self) -> String {
        let part = |before: &str, value: &Option<String>, after: &str| {
            value.as_ref().map(|value| format!("{before}{value}{after}")).unwrap_or_default()
        };
        let file = self.kubeconfig.as_ref().map(|path| path.display().to_string());
        let (namespace, port) = (part("", &self.namespace, "/"), part(":", &self.port, ""));
        let (context, file) = (part(" of ", &self.context, ""), part(" in ", &file, ""));
        format!("{namespace}{}{port}{context}{file}", self.service)
    }
}

impl SettingsTable for KubernetesService {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "service",
            "Name of the service whose endpoints are upstreams.",
            &value(|from: &mut Self| &mut from.service, text("name in Kubernetes", kubernetes_name)),
        )
        .required(),
        row(
            "namespace",
            "Namespace of the service; the balancer's own by default.",
            &value(|from: &mut Self| &mut from.namespace, maybe(text("name in Kubernetes", kubernetes_name))),
        ),
        row(
            "port",
            "Name or number of the port of the pods; the only one by default, or `http`.",
            &value(|from: &mut Self| &mut from.port, maybe(text("name in Kubernetes", kubernetes_name))),
        ),
        row(
            "model_label",
            "Label of the service with the model's name, for engines that list no models.",
            &value(|from: &mut Self| &mut from.model_label, maybe(text("name of a label", plain))),
        ),
        row(
            "role_label",
            "Label of the service with the role of its engines; those of the role `prefill` are left out.",
            &value(|from: &mut Self| &mut from.role_label, maybe(text("name of a label", plain))),
        ),
        row(
            "kubeconfig",
            "File with the API server and the credentials; `$KUBECONFIG` or the pod's account by default.",
            &value(|from: &mut Self| &mut from.kubeconfig, maybe(path())),
        ),
        row(
            "context",
            "Context of the kubeconfig; its current one by default.",
            &value(|from: &mut Self| &mut from.context, maybe(text("name of a context", plain))),
        ),
    ];

    fn defaults() -> Self {
        KubernetesService::new("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_tells_two_services_apart() {
        let plain = KubernetesService::new("vllm");
        assert_eq!(plain.display(), "vllm");
        let full = KubernetesService {
            namespace: Some("default".into()),
            port: Some("http".into()),
            kubeconfig: Some("/etc/kube/b".into()),
            context: Some("east".into()),
            ..plain
        };
        assert_eq!(full.display(), "default/vllm:http of east in /etc/kube/b");
    }
}
