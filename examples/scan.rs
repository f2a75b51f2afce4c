use upperdeck::overlay::xattr::Namespace;
use upperdeck::scan::*;
fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let jobs: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let never = std::sync::atomic::AtomicBool::new(false);
    let exclusions = Exclusions::new(Rules::default()).unwrap();
    let t = std::time::Instant::now();
    let s = Scan::new(
        &Roots {
            upper: dir.into(),
            lowers: vec![],
            data_only: vec![],
            lowers_known: false,
            namespace: Namespace::Trusted,
        },
        &Options {
            jobs,
            uid_map: &[],
            gid_map: &[],
            exclusions: &exclusions,
            caps: Caps::default(),
            runtime_root_mode: None,
            cancel: &never,
        },
    )
    .unwrap();
    let e = t.elapsed().as_secs_f64();
    let n = s.entries().len();
    let hwm = |k: &str| {
        let t = std::fs::read_to_string("/proc/self/status").unwrap();
        t.lines().find(|l| l.starts_with(k)).unwrap().to_owned()
    };
    println!("{n} entries {e:.2} s {} {}", hwm("VmHWM"), hwm("VmRSS"));
    let t = std::time::Instant::now();
    let p = upperdeck::layer::Plan::new(std::sync::Arc::new(s), None);
    println!(
        "plan {:.2} s {} bytes {}",
        t.elapsed().as_secs_f64(),
        p.tar_size(),
        hwm("VmHWM")
    );
}
