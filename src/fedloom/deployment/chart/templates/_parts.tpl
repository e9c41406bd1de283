{{- define "fedloom.selector" -}}
app.kubernetes.io/name: fedloom
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: {{ .Values.side }}
{{- end }}

{{- define "fedloom.head" -}}
metadata:
  name: {{ .Release.Name | quote }}
  labels:
    {{- include "fedloom.selector" . | nindent 4 }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "fedloom.contained" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* Text of the file in /etc/fedloom: a server's recipe or a client's policy, where there is one. */ -}}
{{- define "fedloom.file" -}}
{{- if eq .Values.side "server" }}{{ .Values.server.recipe }}{{ else }}{{ .Values.client.policy }}{{ end }}
{{- end }}
