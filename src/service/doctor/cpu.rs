//! Checks for a limit on processor time, which lengthens the time for which containers are frozen.

use super::{Finding, Options};
use crate::node::background::{CpuLimit, cpu_limit};

pub(super) fn check(options: &Options) -> Vec<Finding> {
    vec![judge(cpu_limit(options.roots.host_root.as_deref()))]
}

fn judge(limit: Option<CpuLimit>) -> Finding {
    let Some(limit) = limit else {
        return Finding::ok("cpu", "no limit on processor time");
    };
    let found = limit.to_string();
    if limit.can_be_left {
        Finding::ok(
            "cpu",
            format!("{found}; it is left while a container is frozen"),
        )
    } else {
        let advice = "set no CPU limit on the pod (a request is right), or mount the node's cgroups read-write: it makes the \
                      pauses of containers longer";
        Finding::warning("cpu", found, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_limit_that_cannot_be_left_is_told_with_its_file() {
        assert_eq!(judge(None).state, State::Ok);
        let limit = |can_be_left| CpuLimit {
            cores: 0.1,
            file: "/sys/fs/cgroup/cpu.max".into(),
            can_be_left,
        };
        assert_eq!(judge(Some(limit(true))).state, State::Ok);
        let told = judge(Some(limit(false)));
        assert_eq!(told.state, State::Warning);
        assert_eq!(
            told.found,
            "no more than 0.10 cores (/sys/fs/cgroup/cpu.max)"
        );
    }
}
