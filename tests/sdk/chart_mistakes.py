"""Changes of charts/vllm-lb that its checks find."""

# For each check: the file in templates, the text, what takes its place, and the value file of chart.CASES.
MISTAKES = {
    "invalid_objects": (
        ("deployment.yaml", "replicas:", "replica:", "default"),
        ("poddisruptionbudget.yaml", "policy/v1", "policy/v1\nstatus: {currentHealthy: x}", "default"),
        ("servicemonitor.yaml", "path: /metrics", "paths: /metrics", "everything"),
        ("autoscaling.yaml", "pollingInterval: 15", "pollingInterval: fast", "everything"),
    ),
    "wrong_selectors": (
        ("service.yaml", "component: balancer", "component: balancers", "default"),
        ("service.yaml", "    app.kubernetes.io/component: balancer\n", "", "default"),
        ("poddisruptionbudget.yaml", "component: balancer", "component: admin", "default"),
        ("networkpolicy.yaml", "component: balancer", "component: x", "everything"),
        ("_helpers.tpl", "app.kubernetes.io/instance: {{ .Release.Name | quote }}\n", "", "default"),
    ),
    "wrong_monitors": (
        ("servicemonitor.yaml", "component: admin", "component: clients", "everything"),
        ("servicemonitor.yaml", "      app.kubernetes.io/component: admin\n", "", "everything"),
        ("servicemonitor.yaml", "port: admin", "port: metrics", "everything"),
        ("_helpers.tpl", "{{ .Release.Namespace }}/", "", "everything"),
    ),
    "wrong_ports": (
        ("deployment.yaml", "containerPort: 8000", "containerPort: 8080", "default"),
        ("_helpers.tpl", "%s:9090", "%s:9091", "default"),
        ("service.yaml", "targetPort: http", "targetPort: admin", "default"),
        ("networkpolicy.yaml", "      from:\n        #", "      peers:\n        #", "everything"),
        ("networkpolicy.yaml", "component: test", "component: tests", "hpa"),
    ),
    "public_admin_listeners": (
        ("service.yaml", "type: ClusterIP", "type: NodePort", "default"),
        ("_helpers.tpl", "${VLLM_LB_ADMIN_TOKEN}", "${VLLM_LB_ADMIN_TOKEN:-}", "default"),
        ("_helpers.tpl", "secretKeyRef:", "configMapKeyRef:", "default"),
    ),
    "wrong_grace_periods": (
        ("_helpers.tpl", "add .Values.shutdown.preStopSleep $drain", "add $drain", "everything"),
        ("_helpers.tpl", "$grace 20", "$grace 10", "default"),
        ("_helpers.tpl", '"m" 60', '"m" 30', "default"),
        ("_helpers.tpl", '"h" 3600', '"h" 60', "everything"),
    ),
    "late_readiness": (
        ("../values.yaml", "periodSeconds: 3\n", "periodSeconds: 30\n", "default"),
    ),
    "loose_pods": (
        ("../values.yaml", "  runAsNonRoot: true\n", "", "default"),
        ("../values.yaml", "  runAsUser: 65532\n", "", "default"),
        ("../values.yaml", "runAsUser: 65532", "runAsUser: 0", "default"),
        ("_helpers.tpl", "drop: [ALL]", "drop: [NET_RAW]", "default"),
        ("_helpers.tpl", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "default"),
        ("deployment.yaml", "    spec:\n", "    spec:\n      hostNetwork: true\n", "default"),
    ),
    "misplaced_tests": (
        ("tests/fleet.yaml", ".Values.nodeSelector", ".Values.podLabels", "everything"),
        ("tests/fleet.yaml", ".Values.tolerations", ".Values.none", "everything"),
        ("tests/fleet.yaml", ".Values.imagePullSecrets", ".Values.none", "everything"),
        ("tests/fleet.yaml", ".Values.affinity.nodeAffinity", ".Values.none", "dns"),
    ),
    "stuck_rollouts": (
        ("deployment.yaml", "maxSurge: 0, maxUnavailable: 1", "maxSurge: 1, maxUnavailable: 0", "everything"),
        ("deployment.yaml", "maxSurge: 1, maxUnavailable: 0", "maxSurge: 0, maxUnavailable: 1", "default"),
    ),
    "dangling_names": (
        ("deployment.yaml", "mountPath: /etc/vllm-lb,", "mountPath: /etc/lb,", "default"),
        (
            "deployment.yaml",
            "configMap: {name: {{ $name | quote }}}",
            "configMap: {name: {{ $name }}-x}",
            "default",
        ),
        ("deployment.yaml", "- {name: run, mountPath: /run/vllm-lb}", "", "default"),
        ("secret.yaml", "name: {{ $name | quote }}", "name: {{ $name }}-x", "default"),
        ("autoscaling.yaml", '"%s-admin"', '"%s-metrics"', "hpa"),
    ),
    "wrong_rights": (
        ("rbac.yaml", "resources: [endpointslices]", "resources: [endpointslices, pods]", "default"),
        ("rbac.yaml", "get, list, watch", "get, list, watch, update", "default"),
        ("rbac.yaml", "namespace: {{ . | quote }}", "namespace: {{ $own | quote }}", "everything"),
        ("rbac.yaml", "kind: Role\n", "kind: ClusterRole\n", "default"),
        ("deployment.yaml", "{{ gt (len", "{{ ge (len", "dns"),
    ),
    "other_alerts": (
        ("prometheusrule.yaml", "resident_bytes{%s} > %s", "resident_bytes > %[2]s", "everything"),
        ("prometheusrule.yaml", ".Values.resources.limits", ".Values.resources.requests", "hpa"),
        ("prometheusrule.yaml", ".Values.config.peek", ".Values.config.queue", "everything"),
        ("_helpers.tpl", '"M" 1e6', '"M" 1048576', "everything"),
        ("_helpers.tpl", '"Gi" 1073741824', '"Gi" 1e9', "everything"),
        ("prometheusrule.yaml", '"vllm-lb.job" .', '"vllm-lb.fullname" .', "everything"),
        ("prometheusrule.yaml", "| replace", '| replace "> 0.05" "> 0.5" | replace', "everything"),
        ("servicemonitor.yaml", '"vllm-lb.job"', '"vllm-lb.fullname"', "everything"),
        ("prometheusrule.yaml", '"vllm-lb.job"', '"vllm-lb.fullname"', "everything"),
    ),
    "other_dashboards": (
        ("dashboard.yaml", "| nindent", '| replace "sum" "avg" | nindent', "everything"),
    ),
    "wrong_scaling": (
        ("autoscaling.yaml", "name: vllm_lb_queued}", "name: vllm_lb_queue_total}", "hpa"),
        ("autoscaling.yaml", "sum(vllm_lb_queued", "sum(vllm_lb_waiting", "everything"),
        ("autoscaling.yaml", "sum(vllm_lb_queued", "max by (instance) (vllm_lb_queued", "everything"),
        ("autoscaling.yaml", "job=%q", "service=%q", "everything"),
        ("autoscaling.yaml", '"vllm-lb.job"', '"vllm-lb.fullname"', "everything"),
    ),
    "weak_tokens": (
        ("secret.yaml", "randAlphaNum 40", "randAlphaNum 4", "default"),
    ),
}
