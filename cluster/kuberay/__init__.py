"""KubeRay's objects as plain dicts: built from a cluster's spec, checked before they are sent. No client in here."""
