//! The cgroup freezer: a guard that thaws when dropped, and a watchdog process that thaws when this one is killed.
