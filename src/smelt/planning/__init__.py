"""Recipe and headers -> Plan: one entry per output tensor, every number resolved; no tensor data is read."""
