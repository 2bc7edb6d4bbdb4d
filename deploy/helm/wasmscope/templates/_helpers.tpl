{{- define "wasmscope.name" -}}
{{- if contains "wasmscope" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-wasmscope" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "wasmscope.account" -}}
{{- .Values.serviceAccount.name | default (include "wasmscope.name" .) }}
{{- end }}

{{- define "wasmscope.selector" -}}
app.kubernetes.io/name: wasmscope
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "wasmscope.labels" -}}
{{ include "wasmscope.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "wasmscope.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}
