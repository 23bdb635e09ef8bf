"""The tests; shared helpers are imported as `tests.harness.servers` and the like."""
