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

{{/* What all pods have in common: takes the root and the service's values. */}}
{{- define "sfllm.pod" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
# Kubernetes would set SFLLM_PORT and others for a service of such a name, which are settings of ours.
enableServiceLinks: false
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

{{/* Variables of all services, and then the service's own from its values. */}}
{{- define "sfllm.env" -}}
- {name: SFLLM_LOG_LEVEL, value: {{ .root.Values.logLevel | quote }}}
- {name: SFLLM_LOG_FORMAT, value: json}
- {name: HOME, value: /tmp}
{{- range $name, $value := .values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}
