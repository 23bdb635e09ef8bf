"""QMP as QEMU speaks it (docs/interop/qmp-spec), server and client, and the commands `x-qedfs-*` beside it."""
