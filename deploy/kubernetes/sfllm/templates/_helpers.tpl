{{/* The beginning of every object's name. */}}
{{- define "sfllm.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What never changes of an object's labels, and so can select pods. */}}
{{- define "sfllm.selector" -}}
app.kubernetes.io/name: sfllm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sfllm.labels" -}}
{{ include "sfllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* An image: takes the root and the service's values. */}}
{{- define "sfllm.image" -}}
{{- $image := .root.Values.image -}}
{{ $image.registry }}{{ .values.image }}:{{ .values.tag | default $image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{- define "sfllm.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "sfllm.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* What all pods have in common: takes the root, the component, the service's values, and labels to spread by. */}}
{{- define "sfllm.pod" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
serviceAccountName: {{ include "sfllm.serviceAccount" .root }}
automountServiceAccountToken: false
# Kubernetes would set SFLLM_PORT and others for a service of such a name, which are settings of ours.
enableServiceLinks: false
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if ne .component "scheduler" }}
# One host less is to be one process less.
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .values.spreadOver }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "sfllm.selector" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
        {{- with .values.name }}
        sfllm/model: {{ . }}
        {{- end }}
{{- end }}
{{- end -}}

{{/* What all containers have in common. */}}
{{- define "sfllm.container" -}}
image: {{ include "sfllm.image" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
livenessProbe:
  httpGet: {path: /health, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
resources:
  {{- toYaml .values.resources | nindent 2 }}
{{- end -}}

{{/* A start that is not judged before its time is up: takes the seconds. */}}
{{- define "sfllm.startupProbe" -}}
startupProbe:
  httpGet: {path: /health, port: admin}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .) 4) 5 }}
{{- end -}}

{{/* Variables of all services, and then the service's own from its values. */}}
{{- define "sfllm.env" -}}
- {name: SFLLM_LOG_LEVEL, value: {{ .root.Values.logLevel | quote }}}
- {name: SFLLM_LOG_FORMAT, value: json}
- {name: HOME, value: /tmp}
{{- if .root.Values.links.insecure }}
- {name: SFLLM_INSECURE_LINKS, value: "1"}
{{- else }}
- {name: SFLLM_LINK_KEYS, value: /run/sfllm/links/link.keys}
{{- end }}
{{- with .root.Values.tracing.endpoint }}
- {name: SFLLM_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .root.Values.tracing.headersSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom:
    secretKeyRef: {name: {{ . | quote }}, key: headers}
{{- end }}
{{- range $name, $value := .values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{/* The keys of the links: of the secret each pod sees its own alone. A folder, so that a changed secret appears. */}}
{{- define "sfllm.linkMount" -}}
{{- if not .Values.links.insecure }}
- {name: links, mountPath: /run/sfllm/links, readOnly: true}
{{- end }}
{{- end -}}

{{- define "sfllm.linkVolume" -}}
{{- if not .root.Values.links.insecure }}
{{- $why := "links.secret is empty: name the Secret with the keys of the links between the services (`sfllm keys links DIR --kubernetes NAME | kubectl apply -f -` makes one), or say links.insecure=true" }}
- name: links
  secret:
    secretName: {{ required $why .root.Values.links.secret | quote }}
    defaultMode: 0440
    items: [{key: {{ .component }}.keys, path: link.keys}]
{{- end }}
{{- end -}}

{{/* Makes new pods when the secret's own part of a service has changed, and nothing else of it has. */}}
{{- define "sfllm.annotations" -}}
{{- $secret := dict }}
{{- if not .root.Values.links.insecure }}
{{- $secret = lookup "v1" "Secret" .root.Release.Namespace .root.Values.links.secret }}
{{- end }}
{{- $own := get ($secret.data | default dict) (printf "%s.keys" .component) }}
{{- $annotations := dict }}
{{- with $own }}
{{- $_ := set $annotations "checksum/links" (sha256sum .) }}
{{- end }}
{{- with mergeOverwrite $annotations (deepCopy .values.podAnnotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
