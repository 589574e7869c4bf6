//! Whole clusters for tests: real servers and agents, real etcd and QEMU.
