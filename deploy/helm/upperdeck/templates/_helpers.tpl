{{- define "upperdeck.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "upperdeck.fullname" -}}
{{- $name := include "upperdeck.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "upperdeck.selector" -}}
app.kubernetes.io/name: {{ include "upperdeck.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "upperdeck.labels" -}}
{{ include "upperdeck.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "upperdeck.image" -}}
{{- $repository := required "image.repository: make the image with deploy/image and push it" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "upperdeck.target" -}}
{{- required "target: where images go, e.g. harbor.example.org/sessions/{user}/{name}:{tag}" .Values.target -}}
{{- end -}}

{{/* The fixed part of the target, which agents permit. */}}
{{- define "upperdeck.allow" -}}
{{- if .Values.agent.allow -}}
{{ toJson .Values.agent.allow }}
{{- else -}}
{{- $fixed := include "upperdeck.target" . | splitList "{" | first | trimSuffix "/" -}}
{{ list $fixed | toJson }}
{{- end -}}
{{- end -}}

{{/* Whether keys and a token are generated: a Secret that is named is used instead. */}}
{{- define "upperdeck.generates" -}}
{{- and .Values.secrets.generate (not .Values.secrets.existingSecret) -}}
{{- end -}}

{{- define "upperdeck.secret" -}}
{{- if eq (include "upperdeck.generates" .) "true" -}}
{{ include "upperdeck.fullname" . }}-keys
{{- else -}}
{{- required "secrets.existingSecret: needed where secrets.generate is false" .Values.secrets.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* Secret with Redis' password; empty: none. */}}
{{- define "upperdeck.redisSecret" -}}
{{- if or .Values.redis.url .Values.redis.existingSecret -}}
{{ .Values.redis.existingSecret }}
{{- else -}}
{{ include "upperdeck.fullname" . }}-redis
{{- end -}}
{{- end -}}

{{- define "upperdeck.redisUrl" -}}
{{- default (printf "redis://%s-redis" (include "upperdeck.fullname" .)) .Values.redis.url -}}
{{- end -}}

{{/* Directories of the runtimes, as JSON: flags of the agent, and what is mounted. */}}
{{- define "upperdeck.runtime" -}}
{{- $presets := dict
  "kubeadm" (dict "containerdRoot" "/var/lib/containerd" "containerdState" "/run/containerd")
  "erofs" (dict "containerdRoot" "/var/lib/containerd" "containerdState" "/run/containerd")
  "k3s" (dict "containerdRoot" "/var/lib/rancher/k3s/agent/containerd" "containerdState" "/run/k3s/containerd")
  "rke2" (dict "containerdRoot" "/var/lib/rancher/rke2/agent/containerd" "containerdState" "/run/k3s/containerd")
  "crio" (dict "storageRoot" "/var/lib/containers/storage" "storageRunRoot" "/run/containers/storage")
  "custom" (dict) -}}
{{- $found := dict -}}
{{- range $key, $path := get $presets .Values.preset -}}{{- $_ := set $found $key $path -}}{{- end -}}
{{- range $key := list "containerdRoot" "containerdState" "storageRoot" "storageRunRoot" -}}
{{- with get $.Values.agent.runtime $key -}}{{- $_ := set $found $key . -}}{{- end -}}
{{- end -}}
{{- if not $found -}}{{- fail "agent.runtime: preset custom needs the directories of a runtime" -}}{{- end -}}
{{- if and (eq .Values.preset "erofs") (ne .Values.agent.mountPropagation "HostToContainer") -}}
{{- fail "agent.mountPropagation: lower directories of EROFS are mounts, which are seen with HostToContainer only" -}}
{{- end -}}
{{ toJson $found }}
{{- end -}}

{{/* Settings as TOML: JSON's strings, numbers, booleans and lists are TOML's. */}}
{{- define "upperdeck.toml" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value -}}{{- fail (printf "settings.%s: a setting is a text, a number, a boolean or a list" $key) -}}{{- end -}}
{{- $lines = append $lines (printf "%s = %s" $key (toJson $value)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{- define "upperdeck.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "upperdeck.noRights" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
