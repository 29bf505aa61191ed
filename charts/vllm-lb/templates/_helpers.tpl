{{/*
The name of all objects: the release's, with the chart's where it does not have that. A Service begins with a
letter and has no dot. 50 characters leave room for what is appended: KEDA takes the longest name for a label.
*/}}
{{- define "vllm-lb.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- $made := ternary $release (printf "%s-%s" $release $name) (contains $name $release) -}}
{{- if not (regexMatch "^[a-z]" $made) -}}
{{- $made = printf "%s-%s" $name $release -}}
{{- end -}}
{{- regexReplaceAll "-+$" (default $made .Values.fullnameOverride | trunc 50) "" -}}
{{- end }}

{{/* The job of Prometheus: releases of one name in two namespaces are two fleets. */}}
{{- define "vllm-lb.job" -}}
{{ .Release.Namespace }}/{{ include "vllm-lb.fullname" . }}
{{- end }}

{{/* What a Deployment selects by: these labels cannot change over upgrades. */}}
{{- define "vllm-lb.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vllm-lb.labels" -}}
{{ include "vllm-lb.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "vllm-lb.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "vllm-lb.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "vllm-lb.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A duration of the configuration in whole seconds, rounded up. */}}
{{- define "vllm-lb.seconds" -}}
{{- $number := regexFind "^[0-9]+" (toString .) | int64 -}}
{{- $unit := regexFind "[a-z]+$" (toString .) -}}
{{- if eq $unit "ms" -}}
{{ div (add $number 999) 1000 }}
{{- else -}}
{{ mul $number (get (dict "" 1 "s" 1 "m" 60 "h" 3600 "d" 86400) $unit) }}
{{- end -}}
{{- end }}

{{/* A size of Kubernetes (`6Gi`) or of the configuration (`2GiB`) in bytes; empty for another form. */}}
{{- define "vllm-lb.bytes" -}}
{{- $text := ternary . (int64 .) (kindIs "string" .) | toString -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $units := dict "" 1 "k" 1e3 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 -}}
{{- $units = merge $units (dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776) -}}
{{- $unit := trimPrefix $number $text | trimSuffix "B" -}}
{{- if and $number (hasKey $units $unit) -}}
{{ mulf (float64 $number) (get $units $unit) | int64 }}
{{- end -}}
{{- end }}

{{/* The time that a pod has to end: what the balancer may take, and twenty seconds more:
traces may be stored for ten seconds after `grace`. */}}
{{- define "vllm-lb.gracePeriod" -}}
{{- $drain := include "vllm-lb.seconds" .Values.shutdown.drain | int64 -}}
{{- $grace := include "vllm-lb.seconds" .Values.shutdown.grace | int64 -}}
{{ add .Values.shutdown.preStopSleep $drain $grace 20 }}
{{- end }}

{{/* "yes" for an item of `upstreams` that the balancer finds through the API of its own cluster. */}}
{{- define "vllm-lb.isWatched" -}}
{{- if kindIs "map" . -}}
{{- with .kubernetes -}}
{{- if not .kubeconfig }}yes{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The items of `upstreams`, in which Services of this cluster have a namespace. */}}
{{- define "vllm-lb.upstreams" -}}
{{- $items := list -}}
{{- range .Values.upstreams -}}
{{- $item := . -}}
{{- if include "vllm-lb.isWatched" . -}}
{{- $service := merge (deepCopy .kubernetes) (dict "namespace" $.Release.Namespace) -}}
{{- $item = merge (dict "kubernetes" $service) (omit . "kubernetes") -}}
{{- end -}}
{{- $items = append $items $item -}}
{{- end -}}
{{ dict "items" $items | toJson }}
{{- end }}

{{/* The namespaces in which the balancers watch EndpointSlices. */}}
{{- define "vllm-lb.namespaces" -}}
{{- $found := list -}}
{{- range (include "vllm-lb.upstreams" . | fromJson).items -}}
{{- if include "vllm-lb.isWatched" . -}}
{{- $found = append $found .kubernetes.namespace -}}
{{- end -}}
{{- end -}}
{{ dict "items" ($found | uniq | sortAlpha) | toJson }}
{{- end }}

{{/* The file lb.yaml. */}}
{{- define "vllm-lb.config" -}}
{{- $listen := dict "address" (printf "%s:8000" .Values.bindAddress) -}}
{{- if .Values.tls.existingSecret -}}
{{- $tls := dict "certificate" "/etc/vllm-lb-tls/tls.crt" "key" "/etc/vllm-lb-tls/tls.key" -}}
{{- $listen = set $listen "tls" $tls -}}
{{- end -}}
{{- $admin := dict "address" (printf "%s:9090" .Values.bindAddress) "token" "${VLLM_LB_ADMIN_TOKEN}" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "listen" (list $listen) -}}
{{- $_ := set $config "admin" $admin -}}
{{- $_ := set $config "upstreams" (include "vllm-lb.upstreams" . | fromJson).items -}}
{{- $_ := set $config "shutdown" (pick .Values.shutdown "drain" "grace") -}}
{{ toYaml $config }}
{{- end }}

{{- define "vllm-lb.adminSecret" -}}
{{ default (printf "%s-admin" (include "vllm-lb.fullname" .)) .Values.admin.existingSecret }}
{{- end }}

{{- define "vllm-lb.adminSecretKey" -}}
{{ ternary .Values.admin.existingSecretKey "token" (ne .Values.admin.existingSecret "") }}
{{- end }}

{{/* The variable with the token of the admin API. */}}
{{- define "vllm-lb.adminToken" -}}
name: VLLM_LB_ADMIN_TOKEN
valueFrom:
  secretKeyRef:
    name: {{ include "vllm-lb.adminSecret" . | quote }}
    key: {{ include "vllm-lb.adminSecretKey" . | quote }}
{{- end }}

{{/* Helm removes entries of values.yaml that a value file has as null, but keeps other nulls. */}}
{{- define "vllm-lb.podSecurityContext" -}}
{{- $given := dict -}}
{{- range $name, $entry := .Values.podSecurityContext -}}
{{- if not (kindIs "invalid" $entry) -}}
{{- $given = set $given $name $entry -}}
{{- end -}}
{{- end -}}
{{ toYaml $given }}
{{- end }}

{{- define "vllm-lb.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/*
How vLLM servers are added at once, and removed one by one. On SIGTERM, vLLM aborts its requests in flight, unless
it has `--shutdown-timeout`, which has to be shorter than the grace period of its pod.
*/}}
{{- define "vllm-lb.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 30
  policies: [{type: Percent, value: 100, periodSeconds: 60}]
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies: [{type: Pods, value: 1, periodSeconds: 120}]
{{- end }}
