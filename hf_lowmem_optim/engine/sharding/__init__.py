"""Parameters that are sharded over processes (torch's DTensors): nothing here runs or imports anything for others."""
