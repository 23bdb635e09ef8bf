"""What can be read of a mount: status for people and programs, Prometheus metrics. Changes nothing."""
