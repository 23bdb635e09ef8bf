"""Encoding and decoding of QED (QEMU's docs/interop/qed_spec): header, tables, and the private record. No I/O."""
