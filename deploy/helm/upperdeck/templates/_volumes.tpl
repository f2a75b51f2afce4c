{{/* Directories of the runtimes by the names of their volumes, as JSON. */}}
{{- define "upperdeck.nodePaths" -}}
{{- $paths := dict -}}
{{- range $key, $path := include "upperdeck.runtime" . | fromJson -}}{{- $_ := set $paths (kebabcase $key) $path -}}{{- end -}}
{{- range $number, $path := .Values.agent.runtime.extraPaths -}}{{- $_ := set $paths (printf "path-%d" $number) $path -}}{{- end -}}
{{ toJson $paths }}
{{- end -}}

{{/* Secrets that managers and agents both need. */}}
{{- define "upperdeck.secretMounts" -}}
{{- if include "upperdeck.redisSecret" . }}
- {name: redis, mountPath: /etc/upperdeck/redis, readOnly: true}
{{- end }}
{{- if .Values.registry.existingSecret }}
- {name: registry, mountPath: /etc/upperdeck/registry, readOnly: true}
{{- end }}
{{- if .Values.registry.caSecret }}
- {name: ca, mountPath: /etc/upperdeck/ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "upperdeck.secretVolumes" -}}
{{- $values := .root.Values }}
{{- with include "upperdeck.redisSecret" .root }}
- name: redis
  secret: {secretName: {{ . }}, defaultMode: {{ $.mode }}, items: [{key: password, path: password}]}
{{- end }}
{{- with $values.registry.existingSecret }}
- name: registry
  secret: {secretName: {{ . }}, defaultMode: {{ $.mode }}, items: [{key: robot, path: robot}]}
{{- end }}
{{- with $values.registry.caSecret }}
- name: ca
  secret: {secretName: {{ . }}, defaultMode: 0444}
{{- end }}
{{- end -}}
