"""Failure analysis: probes of failed answers (`probe`), causes (`classify`), remedy (`card`). No judge takes part."""
