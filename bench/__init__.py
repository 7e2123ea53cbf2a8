"""The comparison: l4mesh beside HAProxy, nginx and Envoy under the same loads. Run it with ``python -m bench``."""
