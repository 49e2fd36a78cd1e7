{{/*
Workers of a model by the requests that run and wait for it, and by how full its KV caches are: whichever asks for more
workers. Takes the root, the Deployment's name, the model's name in metrics, and the values of autoscaling.
*/}}
{{- define "sfllm.scaling" -}}
{{- $scaling := .scaling }}
{{- if eq $scaling.by "keda" }}
{{- include "sfllm.scaledObject" . }}
{{- else }}
{{- include "sfllm.workerAutoscaler" . }}
{{- end }}
{{- end -}}

{{/* One worker less a minute, and none before cooldownSeconds of calm: a worker that leaves takes its prefix cache along. */}}
{{- define "sfllm.scalingBehavior" -}}
scaleDown:
  stabilizationWindowSeconds: {{ .cooldownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}

{{- define "sfllm.scaledObject" -}}
{{- $scaling := .scaling }}
{{- $match := printf "namespace=%q, model_name=%q" .root.Release.Namespace .served }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  labels:
    {{- include "sfllm.labels" .root | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ .name }}}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  cooldownPeriod: {{ $scaling.cooldownSeconds }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "sfllm.scalingBehavior" $scaling | nindent 8 }}
  triggers:
    # So many running and waiting requests for each worker.
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ $scaling.prometheusAddress }}
        query: {{ printf "sum(sfllm:num_requests_running{%s}) + sum(sfllm:num_requests_waiting{%s})" $match $match | squote }}
        threshold: {{ $scaling.requestsPerWorker | quote }}
    # So full on average are the KV caches of all of them.
    - type: prometheus
      metricType: Value
      metadata:
        serverAddress: {{ $scaling.prometheusAddress }}
        query: {{ printf "avg(sfllm:kv_cache_usage_perc{%s})" $match | squote }}
        threshold: {{ $scaling.kvCacheUsage | quote }}
{{- end -}}

{{/* The same without KEDA: external metrics, which prometheus-adapter makes (prometheus-adapter.yaml beside the chart). */}}
{{- define "sfllm.workerAutoscaler" -}}
{{- $scaling := .scaling }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  labels:
    {{- include "sfllm.labels" .root | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  behavior:
    {{- include "sfllm.scalingBehavior" $scaling | nindent 4 }}
  metrics:
    # So many running and waiting requests for each worker.
    - type: External
      external:
        metric:
          name: sfllm_requests
          selector: {matchLabels: {model_name: {{ .served | quote }}}}
        target: {type: AverageValue, averageValue: {{ $scaling.requestsPerWorker | quote }}}
    # So full on average are the KV caches of all of them.
    - type: External
      external:
        metric:
          name: sfllm_kv_cache_usage
          selector: {matchLabels: {model_name: {{ .served | quote }}}}
        target: {type: Value, value: {{ printf "%dm" (int (round (mulf $scaling.kvCacheUsage 1000) 0)) | quote }}}
{{- end -}}
