//! Event streams: a watcher that disconnects and reconnects misses nothing, whichever process was down in between.

use std::time::Duration;

use serde_json::json;
use upperdeck::service::job::{Phase, Update};

use crate::site::{
    Agent, Events, Outcomes, Site, Who, get, id, phase, progress, session, submit, succeeded, until,
};
use crate::{postgres, support};

/// Checks that every version was received once and in order, up to the last one.
fn check_whole(versions: &[u64], last: u64) {
    assert_eq!(versions, (1..=last).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_hears_every_change_the_progress_between_and_the_end() -> Outcomes {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let mut events = Events::of(at, Who::Alice, job, None).await?;
    let first = events.next().await?.ok_or("no event")?;
    assert_eq!((first.event.as_str(), first.id), ("save", Some(1)));
    assert_eq!(first.data["state"], "queued");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    agent
        .send_update(&claim, 2, phase(Phase::Streaming))
        .await?;
    let mut versions = vec![1];
    let mut half = false;
    let mut last = first.data;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Alice, &path, |save| save["phase"] == "streaming").await?;
    agent.send_update(&claim, 3, progress(50)).await?;
    while let Some(heard) = events.next().await? {
        if heard.data["progress"]["bytes_done"] == 50 && !half {
            half = true;
            agent.end(&claim, 4, succeeded()).await?;
        }
        if heard.event == "save" {
            versions.push(heard.id.ok_or("no id")?);
        } else {
            assert_eq!(heard.id, None);
        }
        last = heard.data;
    }
    assert!(half);
    assert_eq!(last["state"], "succeeded");
    assert_eq!(last["pause_ms"], 2.5);
    check_whole(&versions, last["version"].as_u64().ok_or("no version")?);
    // Who has heard the end is told not to come again.
    let again = Events::of(at, Who::Alice, job, last["version"].as_u64()).await;
    assert!(again.is_err_and(|error| error.to_string().starts_with("204")));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_drops_and_returns_misses_nothing_though_the_manager_was_started_again() -> Outcomes {
    let site = Site::new()?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(&[session(1, Some("alice"))]).await?;
    let mut manager = site.manager().await?;
    let job = submit(manager.address, Who::Alice, &id(1), "v1").await?;
    let claim = agent.claim().await?;
    let path = format!("/api/v1/saves/{job}");
    let mut versions = Vec::new();
    let steps = [
        vec![(0, Update::Assigned), (1, Update::Started)],
        vec![(2, phase(Phase::Locating)), (3, phase(Phase::Scanning))],
        vec![(4, phase(Phase::Streaming)), (5, progress(50))],
        vec![(6, phase(Phase::Base))],
        vec![(7, phase(Phase::Finishing))],
    ];
    for (round, said) in steps.into_iter().enumerate() {
        // Listens a little, and goes in the middle.
        let last = versions.last().copied();
        let mut events = Events::of(manager.address, Who::Alice, job, last).await?;
        let before = get(manager.address, Who::Alice, &path).await?;
        while versions.last().copied() != before["version"].as_u64() {
            let heard = events.next().await?.ok_or("ended")?;
            versions.extend(heard.id);
        }
        drop(events);
        // Meanwhile things happen one by one, and every other time the manager is another one.
        for (seq, said) in said {
            let before = get(manager.address, Who::Alice, &path).await?["version"].clone();
            let is_progress = matches!(&said, Update::Event { event } if matches!(event, upperdeck::service::job::Event::Progress { .. }));
            agent.send_update(&claim, seq, said).await?;
            agent.renew(&claim).await?;
            if !is_progress {
                until(manager.address, Who::Alice, &path, |save| {
                    save["version"] != before
                })
                .await?;
            }
        }
        if round % 2 == 0 {
            manager.stop().await?;
            manager = site.manager().await?;
        }
        agent.renew(&claim).await?;
    }
    agent.confirm(&claim).await?;
    agent.end(&claim, 8, succeeded()).await?;
    let mut events = Events::of(manager.address, Who::Alice, job, versions.last().copied()).await?;
    let mut last = json!(null);
    while let Some(heard) = events.next().await? {
        if heard.event == "save" {
            versions.extend(heard.id);
            last = heard.data;
        }
    }
    assert_eq!(last["state"], "succeeded");
    check_whole(&versions, last["version"].as_u64().ok_or("no version")?);
    assert!(versions.len() >= 8, "{versions:?}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ending_manager_ends_its_streams() -> Outcomes {
    let (_site, manager, _) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let job = submit(manager.address, Who::Alice, &id(1), "v1").await?;
    let mut events = Events::of(manager.address, Who::Alice, job, None).await?;
    assert!(events.next().await?.is_some());
    manager.stop().await?;
    while events.next().await?.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_managers_tell_the_same_story() -> Outcomes {
    let place = match postgres::database() {
        Ok(place) => place,
        Err(reason) => {
            support::ignore(&reason);
            return Ok(());
        }
    };
    let site = Site::on(place)?;
    let (one, two) = (site.manager().await?, site.manager().await?);
    let agent = Agent::new(&site.queue, "a");
    let sessions: Vec<_> = (0..20).map(|n| session(n, Some("alice"))).collect();
    agent.heartbeat(&sessions).await?;
    let mut watching = Vec::new();
    for n in 0..20 {
        let (here, there) = if n % 2 == 0 {
            (&one, &two)
        } else {
            (&two, &one)
        };
        let job = submit(here.address, Who::Alice, &id(n), &format!("v{n}")).await?;
        for at in [here.address, there.address] {
            watching.push(tokio::spawn(async move {
                let story = async {
                    let mut events = Events::of(at, Who::Alice, job, Some(0)).await?;
                    let mut versions = Vec::new();
                    let mut state = json!(null);
                    while let Some(heard) = events.next().await? {
                        versions.extend(heard.id);
                        state = heard.data["state"].clone();
                    }
                    Ok::<_, Box<dyn std::error::Error>>((versions, state))
                };
                story.await.map_err(|error| error.to_string())
            }));
        }
    }
    for _ in 0..20 {
        let claim = agent.claim().await?;
        agent.work(&claim).await?;
    }
    let stories = futures_util::future::join_all(watching).await;
    let mut told = Vec::new();
    for story in stories {
        let (versions, state) = story??;
        assert_eq!(state, "succeeded");
        check_whole(&versions, *versions.last().ok_or("nothing")?);
        told.push(versions);
    }
    assert!(told.chunks(2).all(|two| two[0] == two[1]));
    // Each save went its way once, whoever heard it.
    let saves = get(one.address, Who::Alice, "/api/v1/saves?limit=100").await?;
    for save in saves["saves"].as_array().ok_or("none")? {
        assert_eq!(
            (&save["state"], &save["attempt"]),
            (&json!("succeeded"), &json!(1))
        );
        let path = format!(
            "/api/v1/saves/{}/audit",
            save["id"].as_str().ok_or("no id")?
        );
        let audit = get(two.address, Who::Administrator, &path).await?;
        let states: Vec<_> = audit["transitions"]
            .as_array()
            .ok_or("none")?
            .iter()
            .map(|line| line["to"].as_str().unwrap_or_default())
            .collect();
        assert_eq!(states, ["queued", "assigned", "running", "succeeded"]);
    }
    one.stop().await?;
    tokio::time::sleep(Duration::from_millis(10)).await;
    two.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_tells_a_page_of_all_its_saves_and_of_no_others() -> Outcomes {
    let sessions = [
        session(1, Some("alice")),
        session(2, Some("bob")),
        session(3, Some("alice")),
    ];
    let (site, manager, agent) = Site::at_work(&sessions).await?;
    let second = site.manager().await?;
    let at = manager.address;
    let one = submit(at, Who::Alice, &id(1), "v1").await?;
    let bobs = submit(at, Who::Bob, &id(2), "v1").await?;
    let mut events = Events::at(at, Who::Alice, "/api/v1/events").await?;
    let first = events.next().await?.ok_or("no event")?;
    assert_eq!((first.event.as_str(), first.id), ("save", None));
    assert_eq!(first.data["id"], one.to_string());
    let list = events.next().await?.ok_or("no event")?;
    assert_eq!(list.event, "open");
    assert_eq!(list.data["saves"], json!([one]));
    // One that another manager accepts, and the end of all of them.
    let two = submit(second.address, Who::Alice, &id(3), "v2").await?;
    while events.next().await?.ok_or("ended")?.data["id"] != two.to_string() {}
    let working = tokio::spawn(async move {
        for _ in 0..3 {
            let claim = agent.claim().await.map_err(|e| e.to_string())?;
            agent.work(&claim).await.map_err(|e| e.to_string())?;
        }
        Ok::<_, String>(())
    });
    let mut ended = std::collections::BTreeSet::new();
    while ended.len() < 2 {
        let heard = events.next().await?.ok_or("ended")?;
        if heard.event == "open" {
            continue;
        }
        assert_ne!(heard.data["id"], bobs.to_string());
        if heard.data["state"] == "succeeded" {
            ended.insert(heard.data["id"].to_string());
        }
    }
    assert_eq!(
        ended,
        [json!(one).to_string(), json!(two).to_string()].into()
    );
    working.await??;
    // The list comes again and again, and is empty in the end.
    loop {
        let heard = events.next().await?.ok_or("ended")?;
        if heard.event == "open" && heard.data["saves"] == json!([]) {
            break;
        }
    }
    // An administrator may follow one user or all; other users follow only themselves.
    let others = Events::at(at, Who::Alice, "/api/v1/events?user=bob").await;
    assert!(others.is_err_and(|error| error.to_string().starts_with("403")));
    second.stop().await?;
    manager.stop().await
}
