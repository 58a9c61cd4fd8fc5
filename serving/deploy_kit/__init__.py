"""Files for operators: images, Kubernetes, Envoy, dashboards and a runbook for one or two exports under one name."""
