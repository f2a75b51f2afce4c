//! The packages of saves: what agents report is kept within bounds, found by name, and goes with its save.

use std::time::Duration;

use upperdeck::image::packages::{ChangeKind, Manager, PackageChange, Packages};
use upperdeck::service::job::Update;
use upperdeck::service::record::Record;

use crate::{Outcomes, POLICY, accept, done, on_both, report, save};

fn package(
    manager: Manager,
    name: &str,
    version: Option<&str>,
    previous: Option<&str>,
) -> PackageChange {
    let change = match (previous, version) {
        (None, _) => ChangeKind::Added,
        (_, None) => ChangeKind::Removed,
        _ => ChangeKind::Changed,
    };
    PackageChange {
        manager,
        name: name.to_owned(),
        change,
        version: version.map(str::to_owned),
        previous: previous.map(str::to_owned),
        location: String::new(),
    }
}

fn list(packages: Vec<PackageChange>) -> Update {
    let packages = Packages {
        packages,
        ..Packages::default()
    };
    Update::Packages { packages }
}

#[test]
fn packages_are_found_by_name_and_version_and_go_with_their_save() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let (one, two) = (save("alice", "s1", "v1"), save("bob", "s2", "v2"));
        let first = vec![
            package(Manager::Pip, "Scikit_Learn", Some("1.5"), None),
            package(Manager::Dpkg, "wget", None, Some("1.2")),
        ];
        let many = (0..2500).map(|n| package(Manager::R, &format!("p{n}"), Some("1"), None));
        let second = vec![package(
            Manager::Conda,
            "scikit-learn",
            Some("1.4"),
            Some("1.3"),
        )];
        let second: Vec<_> = second.into_iter().chain(many).collect();
        for (asked, packages) in [(&one, first.clone()), (&two, second)] {
            accept(&record, asked).await?;
            let reports = [
                report(asked.id, 1, 1, 0, Update::Assigned),
                report(asked.id, 1, 1, 1, Update::Started),
                report(asked.id, 1, 1, 2, list(packages)),
                report(asked.id, 1, 1, 3, done()),
            ];
            record.apply_reports(&reports, &POLICY).await?;
        }
        let kept = record.packages(one.id).await?.ok_or("no list")?;
        assert_eq!(kept.packages, first);
        let kept = record.packages(two.id).await?.ok_or("no list")?;
        assert_eq!((kept.packages.len(), kept.more), (2000, 501));

        for (user, name, version, found) in [
            (None, "scikit-learn", None, 2),
            (None, "SCIKIT.learn", None, 1 + 1),
            (Some("alice"), "scikit_learn", None, 1),
            (None, "scikit-learn", Some("1.4"), 1),
            (None, "scikit-learn", Some("1.3"), 0),
            (None, "wget", None, 0),
            (None, "p7", None, 1),
            (None, "'; DROP TABLE packages --", None, 0),
        ] {
            let saves = record.saves_with_package(user, name, version).await?;
            assert_eq!(saves.len(), found, "{user:?} {name} {version:?}");
        }
        record.forget(Some(Duration::ZERO)).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
        record.forget(Some(Duration::ZERO)).await?;
        assert_eq!(record.packages(one.id).await?, None);
        let saves = record
            .saves_with_package(None, "scikit-learn", None)
            .await?;
        assert!(saves.is_empty());
        Ok(())
    })
}

#[test]
fn only_the_agent_that_holds_a_save_describes_it() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let asked = save("alice", "s1", "v1");
        accept(&record, &asked).await?;
        let named = |name: &str| list(vec![package(Manager::Pip, name, Some("1"), None)]);
        let mut foreign = report(asked.id, 1, 3, 9, named("foreign"));
        foreign.node = "another".to_owned();
        let reports = [
            foreign,
            report(asked.id, 1, 2, 0, Update::Assigned),
            report(asked.id, 1, 2, 1, named("own")),
        ];
        record.apply_reports(&reports, &POLICY).await?;
        let late = report(asked.id, 1, 1, 5, named("late"));
        record.apply_reports(&[late], &POLICY).await?;
        let kept = record.packages(asked.id).await?.ok_or("no list")?;
        assert_eq!(kept.packages[0].name, "own");
        Ok(())
    })
}
