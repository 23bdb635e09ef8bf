"""The QED format (QEMU's docs/interop/qed_spec), bytes <-> values: header, tables, our own record. No I/O."""
