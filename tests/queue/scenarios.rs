//! Requirements that every implementation of the queue has to meet.

use std::collections::BTreeSet;
use std::time::Duration;

use upperdeck::service::job::{JobId, Order, Outcome as Ending, Unsaved, Update, now_ms};
use upperdeck::service::queue::{
    ClaimState, Depth, HEARTBEAT_LOST, Limits, Offered, Place, Withdrawn,
};

use crate::world::{
    LONG, NO_LIMITS, NOW, Outcome, World, ended, node, order, report, session, succeeded,
};

/// Returns limits with a maximum of concurrent saves per user and no others.
const fn of_user(user: u32) -> Limits {
    Limits { user, ..NO_LIMITS }
}

on_both! {
    a_save_goes_out_and_its_last_word_comes_back: NO_LIMITS;
    what_ended_is_known_until_it_is_written_down: NO_LIMITS;
    an_order_that_waits_is_replaced_in_its_place: NO_LIMITS;
    who_queues_fifty_does_not_stand_before_who_queues_one: NO_LIMITS;
    who_comes_back_each_time_does_not_keep_another_waiting: NO_LIMITS;
    who_queues_five_thousand_delays_another_by_one_job: Limits { node: 1, ..NO_LIMITS };
    places_are_those_in_which_orders_go_out: NO_LIMITS;
    a_user_has_no_more_than_the_limit_on_all_nodes: of_user(2);
    a_node_has_no_more_than_the_limit: Limits { node: 2, ..NO_LIMITS };
    a_registry_has_no_more_than_the_limit: Limits { registry: 1, ..NO_LIMITS };
    a_limit_that_falls_back_wakes_who_waits_for_it: of_user(1);
    a_claim_that_is_not_renewed_goes_to_another: NO_LIMITS;
    a_claim_that_ended_comes_back_unless_its_place_is_taken: of_user(1);
    the_youngest_agent_takes_over_at_once: NO_LIMITS;
    what_waits_is_taken_back: NO_LIMITS;
    what_is_held_is_told: NO_LIMITS;
    what_is_in_a_hurry_is_told: NO_LIMITS;
    what_gets_its_tag_is_not_taken_back: NO_LIMITS;
    what_a_dead_agent_held_is_taken_back: NO_LIMITS;
    a_pause_is_kept: NO_LIMITS;
    an_order_that_expired_is_offered_again: NO_LIMITS;
    who_waits_is_woken: NO_LIMITS;
    each_who_waits_on_a_node_is_woken: NO_LIMITS;
    each_report_goes_to_one_manager_until_it_is_taken: NO_LIMITS;
    nodes_and_sessions_are_those_last_heard_of: NO_LIMITS;
    one_session_cannot_spoil_the_others: NO_LIMITS;
    how_full_it_is: NO_LIMITS;
}

async fn place(world: &World, job: JobId) -> Result<Option<Place>, Box<dyn std::error::Error>> {
    Ok(world.queue.places(&[job]).await?[0])
}

fn is_held(place: Option<Place>) -> bool {
    matches!(place, Some(Place::Held { lease_ms }) if lease_ms > 0)
}

async fn a_save_goes_out_and_its_last_word_comes_back(world: World) -> Outcome {
    let queue = &world.queue;
    queue.ping().await?;
    let order = order("n1", "ada");
    assert_eq!(queue.offer(&order).await?, Offered::New);
    assert_eq!(queue.offer(&order).await?, Offered::Known);
    assert_eq!(place(&world, order.job).await?, Some(Place::Waiting(0)));
    assert!(world.claim("n2", "b").await?.is_none(), "another node's");

    let claim = world.get("n1", "a").await?;
    assert_eq!(claim.order, order);
    assert!(claim.fence > 0);
    assert!(world.claim("n1", "a").await?.is_none(), "twice");
    assert_eq!(queue.offer(&order).await?, Offered::Known);
    assert!(is_held(place(&world, order.job).await?));

    let started = report(&claim, 0, Update::Started);
    assert_eq!(queue.report(&claim, &started).await?, ClaimState::Held);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Held);
    assert_eq!(queue.confirm(&claim).await?, ClaimState::Held);
    let last = succeeded(&claim);
    assert_eq!(queue.complete(&claim, &last).await?, ClaimState::Held);
    assert_eq!(world.take_all().await?, [started, last]);
    assert_eq!(place(&world, order.job).await?, None);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Lost);
    assert_eq!(
        queue
            .report(&claim, &report(&claim, 9, Update::Started))
            .await?,
        ClaimState::Lost
    );
    assert_eq!(
        queue.complete(&claim, &succeeded(&claim)).await?,
        ClaimState::Lost
    );
    assert!(world.take_all().await?.is_empty());

    // Another attempt has a greater fence, though the queue has forgotten the job.
    let again = Order {
        attempt: 2,
        fence_after: claim.fence,
        ..order
    };
    assert_eq!(queue.offer(&again).await?, Offered::New);
    let later = world.get("n1", "a").await?;
    assert!(later.fence > claim.fence);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Lost);
    assert_eq!(queue.renew(&later).await?, ClaimState::Held);
    Ok(())
}

async fn what_ended_is_known_until_it_is_written_down(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    let last = succeeded(&claim);
    assert_eq!(queue.complete(&claim, &last).await?, ClaimState::Held);
    // The answer was lost, and the agent says it again.
    assert_eq!(queue.complete(&claim, &last).await?, ClaimState::Held);
    assert_eq!(
        place(&world, order.job).await?,
        Some(Place::Held { lease_ms: 0 })
    );
    assert_eq!(queue.offer(&order).await?, Offered::Known);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::TooLate);
    world.pass_lease();
    assert!(world.claim("n1", "a").await?.is_none());
    assert!(queue.reclaim("n1", "b").await?.is_empty());
    assert_eq!(world.take_all().await?, [last]);
    assert_eq!(place(&world, order.job).await?, None);

    // The next attempt may come before the word is taken: its manager has read it.
    let order = world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    let given_back = report(
        &claim,
        1,
        Update::GivenBack {
            reason: "the agent drains".to_owned(),
        },
    );
    assert_eq!(queue.complete(&claim, &given_back).await?, ClaimState::Held);
    let read = queue.reports("m", 10, NOW).await?;
    let again = Order {
        attempt: 2,
        ..order
    };
    assert_eq!(queue.offer(&again).await?, Offered::New);
    queue.acknowledge(&[read[0].entry.clone()]).await?;
    assert_eq!(place(&world, again.job).await?, Some(Place::Waiting(0)));
    Ok(())
}

async fn an_order_that_waits_is_replaced_in_its_place(world: World) -> Outcome {
    let first = world.offer("n1", "ada").await?;
    world.offer("n1", "ada").await?;
    let renewed = Order {
        expires_ms: first.expires_ms + 1,
        ..first
    };
    assert_eq!(world.queue.offer(&renewed).await?, Offered::Known);
    assert_eq!(world.get("n1", "a").await?.order, renewed);
    Ok(())
}

async fn who_queues_fifty_does_not_stand_before_who_queues_one(world: World) -> Outcome {
    for _ in 0..50 {
        world.offer("n1", "ada").await?;
    }
    for _ in 0..3 {
        world.get("n1", "a").await?;
    }
    let one = world.offer("n1", "bob").await?;
    assert_eq!(place(&world, one.job).await?, Some(Place::Waiting(0)));
    let next = world.get("n1", "a").await?;
    assert_eq!(next.order.job, one.job);
    assert_eq!(world.get("n1", "a").await?.order.owner, "ada");
    Ok(())
}

async fn who_comes_back_each_time_does_not_keep_another_waiting(world: World) -> Outcome {
    for _ in 0..20 {
        world.offer("n1", "zoe").await?;
    }
    let mut served = Vec::new();
    for _ in 0..10 {
        world.offer("n1", "ada").await?;
        for _ in 0..2 {
            let claim = world.get("n1", "a").await?;
            served.push(claim.order.owner.clone());
            world.finish(&claim).await?;
        }
    }
    let ada = served.iter().filter(|user| *user == "ada").count();
    assert_eq!((ada, served.len()), (10, 20), "{served:?}");
    Ok(())
}

async fn who_queues_five_thousand_delays_another_by_one_job(world: World) -> Outcome {
    for _ in 0..5000 {
        world.offer("n1", "ada").await?;
    }
    let running = world.get("n1", "a").await?;
    let one = world.offer("n1", "bob").await?;
    assert!(world.claim("n1", "a").await?.is_none());
    assert_eq!(place(&world, one.job).await?, Some(Place::Waiting(0)));
    world.finish(&running).await?;
    assert_eq!(world.get("n1", "a").await?.order.job, one.job);
    assert_eq!(world.queue.depth().await?.waiting, 4999);
    Ok(())
}

async fn places_are_those_in_which_orders_go_out(world: World) -> Outcome {
    let mut jobs = Vec::new();
    for (user, count) in [("ada", 7), ("bob", 2), ("cyd", 4), ("zoe", 1)] {
        for _ in 0..count {
            jobs.push(world.offer("n1", user).await?.job);
        }
        // Some turns are over when the next one comes.
        let claim = world.get("n1", "a").await?;
        jobs.retain(|job| *job != claim.order.job);
    }
    let later = Order {
        not_before_ms: now_ms() + 86_400_000,
        ..order("n1", "ada")
    };
    world.queue.offer(&later).await?;
    let places = world.queue.places(&jobs).await?;
    let mut said: Vec<(u64, JobId)> = Vec::new();
    for (place, job) in places.into_iter().zip(&jobs) {
        let Some(Place::Waiting(before)) = place else {
            return Err(format!("{job}: {place:?}").into());
        };
        said.push((before, *job));
    }
    said.sort_unstable();
    for (index, (before, job)) in said.iter().enumerate() {
        assert_eq!(*before, index as u64);
        assert_eq!(world.get("n1", "a").await?.order.job, *job, "at {index}");
    }
    assert!(world.claim("n1", "a").await?.is_none());
    assert_eq!(place(&world, later.job).await?, Some(Place::Waiting(0)));
    Ok(())
}

async fn a_user_has_no_more_than_the_limit_on_all_nodes(world: World) -> Outcome {
    for name in ["n1", "n1", "n2", "n2"] {
        world.offer(name, "ada").await?;
    }
    let first = world.get("n1", "a").await?;
    let second = world.get("n2", "b").await?;
    assert!(world.claim("n1", "a").await?.is_none());
    assert!(world.claim("n2", "b").await?.is_none());
    // Another user's goes past, on the same node.
    world.offer("n1", "bob").await?;
    assert_eq!(world.get("n1", "a").await?.order.owner, "bob");
    // A place is free when one ends, on whichever node.
    world.finish(&second).await?;
    let third = world.get("n1", "a").await?;
    assert!(world.claim("n2", "b").await?.is_none());
    // And when one is lost, though it is not taken over: its own comes first where it was.
    world.pass_lease();
    let kept = world.get("n1", "a").await?;
    assert!([first.order.job, third.order.job].contains(&kept.order.job));
    assert!(world.claim("n2", "b").await?.is_some());
    assert!(world.claim("n2", "b").await?.is_none());
    Ok(())
}

async fn a_node_has_no_more_than_the_limit(world: World) -> Outcome {
    for user in ["ada", "bob", "cyd"] {
        world.offer("n1", user).await?;
    }
    let got = world.queue.claim("n1", "a", 10, NOW).await?;
    assert_eq!(got.len(), 2);
    assert!(world.claim("n1", "b").await?.is_none());
    world.finish(&got[0]).await?;
    assert!(world.claim("n1", "b").await?.is_some());
    Ok(())
}

async fn a_registry_has_no_more_than_the_limit(world: World) -> Outcome {
    for (name, user) in [("n1", "ada"), ("n2", "bob")] {
        world.offer(name, user).await?;
    }
    let elsewhere = Order {
        destination: "docker://other.example.org:5000/ada/session".to_owned(),
        ..order("n2", "bob")
    };
    world.queue.offer(&elsewhere).await?;
    let first = world.get("n1", "a").await?;
    // The head of the list has to wait, what is behind it and goes elsewhere has not.
    let second = world.get("n2", "b").await?;
    assert_eq!(second.order.job, elsewhere.job);
    assert!(world.claim("n2", "b").await?.is_none());
    world.finish(&first).await?;
    assert!(world.claim("n2", "b").await?.is_some());
    Ok(())
}

async fn a_limit_that_falls_back_wakes_who_waits_for_it(world: World) -> Outcome {
    world.offer("n1", "ada").await?;
    world.offer("n2", "ada").await?;
    let first = world.get("n1", "a").await?;
    let queue = world.queue.clone();
    let waiting = tokio::spawn(async move { queue.claim("n2", "b", 1, LONG).await });
    // Until it waits.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    let claimed = world.queue.complete(&first, &succeeded(&first)).await?;
    assert_eq!(claimed, ClaimState::Held);
    assert_eq!(waiting.await??.len(), 1);
    Ok(())
}

async fn a_claim_that_is_not_renewed_goes_to_another(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    let lost = world.get("n1", "a").await?;
    // Renewed, it outlives its first lease.
    for _ in 0..3 {
        world.pass(world.lease / 2);
        assert_eq!(queue.renew(&lost).await?, ClaimState::Held);
    }
    assert!(world.claim("n1", "b").await?.is_none());
    world.pass_lease();
    assert_eq!(
        place(&world, order.job).await?,
        Some(Place::Held { lease_ms: 0 })
    );
    let taken = world.get("n1", "b").await?;
    assert_eq!(taken.order, order);
    assert!(taken.fence > lost.fence);
    assert_eq!(queue.renew(&lost).await?, ClaimState::Lost);
    assert_eq!(queue.confirm(&lost).await?, ClaimState::Lost);
    assert_eq!(
        queue
            .report(&lost, &report(&lost, 1, Update::Started))
            .await?,
        ClaimState::Lost
    );
    assert_eq!(
        queue.complete(&lost, &succeeded(&lost)).await?,
        ClaimState::Lost
    );
    assert!(world.take_all().await?.is_empty());
    assert_eq!(queue.renew(&taken).await?, ClaimState::Held);
    world.finish(&taken).await
}

async fn a_claim_that_ended_comes_back_unless_its_place_is_taken(world: World) -> Outcome {
    let queue = &world.queue;
    world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    world.pass_lease();
    assert_eq!(queue.renew(&claim).await?, ClaimState::Held);
    assert!(queue.reclaim("n1", "a").await?.is_empty());
    world.pass_lease();
    world.offer("n2", "ada").await?;
    let other = world.get("n2", "b").await?;
    assert_eq!(queue.renew(&claim).await?, ClaimState::Lost);
    assert_eq!(queue.confirm(&claim).await?, ClaimState::Lost);
    assert!(
        queue.reclaim("n1", "a").await?.is_empty(),
        "past the limit of the user"
    );
    world.finish(&other).await?;
    let back = queue.reclaim("n1", "a").await?;
    assert_eq!(back.len(), 1);
    assert!(back[0].fence > claim.fence);
    Ok(())
}

async fn the_youngest_agent_takes_over_at_once(world: World) -> Outcome {
    let queue = &world.queue;
    for _ in 0..2 {
        world.offer("n1", "ada").await?;
    }
    world.offer("n2", "ada").await?;
    let old = queue.claim("n1", "old", 1, NOW).await?;
    let elsewhere = queue.claim("n2", "elsewhere", 1, NOW).await?;
    let young = queue.reclaim("n1", "young").await?;
    assert_eq!(young.len(), 1);
    assert_eq!(young[0].order, old[0].order);
    assert_eq!(queue.renew(&old[0]).await?, ClaimState::Lost);
    assert_eq!(queue.renew(&elsewhere[0]).await?, ClaimState::Held);
    // Its own, and those of a younger one, are left alone.
    assert!(queue.reclaim("n1", "young").await?.is_empty());
    assert!(queue.reclaim("n1", "old").await?.is_empty());
    assert_eq!(queue.renew(&young[0]).await?, ClaimState::Held);
    // Those of which the lease ended are anybody's.
    world.pass_lease();
    let back = queue.reclaim("n1", "old").await?;
    assert_eq!(back.len(), 1);
    assert!(back[0].fence > young[0].fence);
    assert_eq!(world.claim("n1", "old").await?.map(|_| ()), Some(()));
    Ok(())
}

async fn what_waits_is_taken_back(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    let later = Order {
        not_before_ms: now_ms() + 86_400_000,
        ..crate::world::order("n1", "ada")
    };
    queue.offer(&later).await?;
    for job in [order.job, later.job] {
        assert_eq!(queue.withdraw(job).await?, Withdrawn::Removed);
        assert_eq!(queue.withdraw(job).await?, Withdrawn::Unknown);
        assert_eq!(place(&world, job).await?, None);
    }
    world.pass(Duration::from_secs(2 * 86_400));
    assert!(world.claim("n1", "a").await?.is_none());
    let again = Order {
        expires_ms: i64::MAX,
        ..order
    };
    assert_eq!(queue.offer(&again).await?, Offered::New);
    assert!(world.claim("n1", "a").await?.is_some());
    Ok(())
}

async fn what_is_held_is_told(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::CancelRequested);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::CancelRequested);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Cancelled);
    assert_eq!(queue.confirm(&claim).await?, ClaimState::Cancelled);
    let phase = report(&claim, 1, Update::Started);
    assert_eq!(queue.report(&claim, &phase).await?, ClaimState::Cancelled);
    // Who takes it over hears of it too.
    world.pass_lease();
    let taken = world.get("n1", "b").await?;
    assert_eq!(queue.renew(&taken).await?, ClaimState::Cancelled);
    let last = ended(&taken, Ending::Cancelled);
    assert_eq!(queue.complete(&taken, &last).await?, ClaimState::Held);
    assert_eq!(world.take_all().await?, [phase, last]);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::Unknown);
    Ok(())
}

async fn what_is_in_a_hurry_is_told(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    // While it waits, also if its order is renewed.
    assert!(queue.hurry(order.job).await?);
    assert_eq!(queue.offer(&order).await?, Offered::Known);
    let claim = world.get("n1", "a").await?;
    assert_eq!(queue.renew(&claim).await?, ClaimState::Hurried);
    let phase = report(&claim, 1, Update::Started);
    assert_eq!(queue.report(&claim, &phase).await?, ClaimState::Hurried);
    // While it is held, and another one is not.
    let other = world.offer("n1", "ada").await?;
    let held = world.get("n1", "a").await?;
    assert_eq!(queue.renew(&held).await?, ClaimState::Held);
    assert!(queue.hurry(other.job).await?);
    assert_eq!(queue.renew(&held).await?, ClaimState::Hurried);
    // The tag is confirmed as for any other, and whoever is cancelled is told that first.
    assert_eq!(queue.confirm(&claim).await?, ClaimState::Hurried);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::TooLate);
    assert_eq!(queue.withdraw(other.job).await?, Withdrawn::CancelRequested);
    assert_eq!(queue.renew(&held).await?, ClaimState::Cancelled);
    let last = ended(&claim, Ending::Cancelled);
    assert_eq!(queue.complete(&claim, &last).await?, ClaimState::Held);
    assert!(!queue.hurry(order.job).await?);
    assert!(!queue.hurry(upperdeck::service::job::JobId::new()).await?);
    Ok(())
}

async fn what_gets_its_tag_is_not_taken_back(world: World) -> Outcome {
    let queue = &world.queue;
    let order = world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    assert_eq!(queue.confirm(&claim).await?, ClaimState::Held);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::TooLate);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Held);
    // The agent dies over it: the tag may be on, so it goes on where it was.
    world.pass_lease();
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::TooLate);
    let taken = world.get("n1", "b").await?;
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::TooLate);
    assert_eq!(queue.renew(&taken).await?, ClaimState::Held);
    // No agent comes: it has to end some time.
    world.pass(world.lease * 6);
    assert_eq!(queue.withdraw(order.job).await?, Withdrawn::Removed);
    assert_eq!(queue.renew(&taken).await?, ClaimState::Lost);
    Ok(())
}

async fn what_a_dead_agent_held_is_taken_back(world: World) -> Outcome {
    let order = world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    world.pass_lease();
    assert_eq!(world.queue.withdraw(order.job).await?, Withdrawn::Removed);
    assert_eq!(place(&world, order.job).await?, None);
    assert!(world.claim("n1", "b").await?.is_none());
    assert_eq!(world.queue.renew(&claim).await?, ClaimState::Lost);
    assert_eq!(
        world.queue.complete(&claim, &succeeded(&claim)).await?,
        ClaimState::Lost
    );
    Ok(())
}

async fn a_pause_is_kept(world: World) -> Outcome {
    let later = Order {
        not_before_ms: now_ms() + 3_600_000,
        expires_ms: i64::MAX,
        ..order("n1", "ada")
    };
    world.queue.offer(&later).await?;
    let first = world.offer("n1", "ada").await?;
    assert_eq!(place(&world, later.job).await?, Some(Place::Waiting(1)));
    assert_eq!(world.get("n1", "a").await?.order.job, first.job);
    assert!(world.claim("n1", "a").await?.is_none());
    world.pass(Duration::from_secs(3601));
    let got = world.queue.claim("n1", "a", 10, NOW).await?;
    assert!(got.iter().any(|claim| claim.order.job == later.job));

    // Who waits meanwhile gets it when it is due.
    let (name, user) = ("n2", "bob");
    let soon = Order {
        not_before_ms: now_ms() + 3_601_000 + 700,
        expires_ms: i64::MAX,
        ..order(name, user)
    };
    world.queue.offer(&soon).await?;
    assert!(world.claim(name, "b").await?.is_none());
    let got = world.queue.claim(name, "b", 1, LONG).await?;
    assert_eq!(got.len(), 1);
    Ok(())
}

async fn an_order_that_expired_is_offered_again(world: World) -> Outcome {
    let stale = Order {
        expires_ms: now_ms() + 60_000,
        ..order("n1", "ada")
    };
    let good = order("n1", "ada");
    world.queue.offer(&stale).await?;
    world.queue.offer(&good).await?;
    world.pass(Duration::from_secs(61));
    assert_eq!(world.get("n1", "a").await?.order.job, good.job);
    assert!(world.claim("n1", "a").await?.is_none());
    assert_eq!(place(&world, stale.job).await?, None);
    let renewed = Order {
        expires_ms: now_ms() + 3_600_000,
        ..stale
    };
    assert_eq!(world.queue.offer(&renewed).await?, Offered::New);
    let claim = world.get("n1", "a").await?;
    assert_eq!(claim.order.job, renewed.job);
    // A claim is not cut short, but no agent begins anew with an order that has expired.
    world.pass(Duration::from_secs(2 * 3600));
    assert_eq!(world.queue.renew(&claim).await?, ClaimState::Held);
    world.pass_lease();
    assert!(
        world
            .queue
            .reclaim("n1", "b")
            .await?
            .iter()
            .all(|claim| claim.order.job == good.job)
    );
    assert_eq!(place(&world, renewed.job).await?, None);
    Ok(())
}

async fn who_waits_is_woken(world: World) -> Outcome {
    let queue = world.queue.clone();
    let agent = tokio::spawn(async move { queue.claim("n1", "a", 5, LONG).await });
    let queue = world.queue.clone();
    let manager = tokio::spawn(async move { queue.reports("m", 5, LONG).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    // What waits does not hold up what does not.
    world.queue.ping().await?;
    assert!(!agent.is_finished() && !manager.is_finished());
    world.offer("n1", "ada").await?;
    let claims = agent.await??;
    assert_eq!(claims.len(), 1);
    assert!(!manager.is_finished());
    let started = report(&claims[0], 0, Update::Started);
    world.queue.report(&claims[0], &started).await?;
    let reports = manager.await??;
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].report, started);
    // And none in vain.
    let none = world.queue.claim("n1", "a", 1, Duration::from_millis(50));
    assert!(none.await?.is_empty());
    let queue = &world.queue;
    assert!(
        queue
            .reports("m", 1, Duration::from_millis(50))
            .await?
            .is_empty()
    );
    Ok(())
}

async fn each_who_waits_on_a_node_is_woken(world: World) -> Outcome {
    let mut waiting = Vec::new();
    for name in ["a", "a", "b"] {
        let queue = world.queue.clone();
        waiting.push(tokio::spawn(async move {
            queue.claim("n1", name, 1, LONG).await
        }));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..3 {
        world.offer("n1", "ada").await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for one in waiting {
        assert_eq!(one.await??.len(), 1);
    }
    Ok(())
}

async fn each_report_goes_to_one_manager_until_it_is_taken(world: World) -> Outcome {
    let queue = &world.queue;
    world.offer("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    for seq in 0..10 {
        queue
            .report(&claim, &report(&claim, seq, Update::Started))
            .await?;
    }
    let first = queue.reports("m1", 4, NOW).await?;
    let second = queue.reports("m2", 100, NOW).await?;
    assert_eq!((first.len(), second.len()), (4, 6));
    let seqs: Vec<u64> = first
        .iter()
        .chain(&second)
        .map(|one| one.report.seq)
        .collect();
    assert_eq!(seqs, (0..10).collect::<Vec<_>>());
    assert_eq!(queue.depth().await?.reports, 10);
    let entries: Vec<_> = second.iter().map(|one| one.entry.clone()).collect();
    queue.acknowledge(&entries).await?;
    assert_eq!(queue.depth().await?.reports, 4);
    assert!(queue.reports("m2", 100, NOW).await?.is_empty());
    // The first manager is dead.
    tokio::time::sleep(world.ack_timeout + Duration::from_millis(200)).await;
    let again = queue.reports("m2", 100, NOW).await?;
    let seqs: BTreeSet<u64> = again.iter().map(|one| one.report.seq).collect();
    assert_eq!(seqs, (0..4).collect());
    let entries: Vec<_> = again.iter().map(|one| one.entry.clone()).collect();
    queue.acknowledge(&entries).await?;
    queue.acknowledge(&entries).await?;
    assert_eq!(queue.depth().await?.reports, 0);
    Ok(())
}

/// A tenant can create a session with thousands of mounts of 3.7 KB each. It is reported in short form, and the others
/// in full.
async fn one_session_cannot_spoil_the_others(world: World) -> Outcome {
    let queue = &world.queue;
    let mut hostile = session("n1", "bb");
    hostile.unsaved = (0..15_500)
        .map(|number| Unsaved {
            path: format!("/mnt/{}{number}", "\u{1}".repeat(3700)),
            kind: "tmpfs".to_owned(),
            data: false,
        })
        .collect();
    hostile.image = Some("\u{1}".repeat(1 << 20));
    let all = [session("n1", "aa"), hostile, session("n1", "cc")];
    queue.heartbeat(&node("n1"), Some(&all)).await?;
    let mut told = queue.sessions().await?;
    told.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!((&told[0], &told[2]), (&all[0], &all[2]));
    assert_eq!((told.len(), told[1].id.as_str()), (3, "bb"));
    assert_eq!((told[1].unsaved.len(), told[1].unsaved_more), (0, 15_500));
    assert!(told[1].problem.is_some());
    assert!(
        told[1]
            .image
            .as_ref()
            .is_some_and(|image| image.len() < 4096)
    );
    Ok(())
}

async fn nodes_and_sessions_are_those_last_heard_of(world: World) -> Outcome {
    let queue = &world.queue;
    assert!(queue.nodes().await?.is_empty());
    let (one, two) = (node("n1"), node("n2"));
    let sessions = [session("n1", "aa"), session("n1", "bb")];
    queue.heartbeat(&one, Some(&sessions)).await?;
    queue.heartbeat(&two, Some(&[session("n2", "cc")])).await?;
    let mut nodes = queue.nodes().await?;
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(nodes, [one.clone(), two]);
    assert_eq!(queue.sessions().await?.len(), 3);

    world.pass(HEARTBEAT_LOST / 2);
    let one = upperdeck::service::job::Node {
        draining: true,
        at_ms: one.at_ms - 3_600_000,
        ..one
    };
    queue.heartbeat(&one, None).await?;
    world.pass(HEARTBEAT_LOST / 2 + Duration::from_secs(1));
    assert_eq!(queue.sessions().await?, sessions);
    assert_eq!(queue.nodes().await?.len(), 2);
    // Whatever an agent takes for the time.
    let silences = queue.heartbeat_ages().await?;
    assert_eq!(silences.len(), 2);
    assert!(silences["n1"] < HEARTBEAT_LOST, "{silences:?}");
    assert!(silences["n2"] > HEARTBEAT_LOST, "{silences:?}");
    queue.heartbeat(&one, Some(&[])).await?;
    assert!(queue.sessions().await?.is_empty());
    world.pass(Duration::from_secs(86_400 - 5));
    let nodes = queue.nodes().await?;
    assert_eq!(nodes, [one]);
    Ok(())
}

async fn how_full_it_is(world: World) -> Outcome {
    assert_eq!(world.queue.depth().await?, Depth::default());
    for name in ["n1", "n1", "n2"] {
        world.offer(name, "ada").await?;
    }
    let later = Order {
        not_before_ms: now_ms() + 60_000,
        ..order("n3", "bob")
    };
    world.queue.offer(&later).await?;
    let claim = world.get("n1", "a").await?;
    world
        .queue
        .report(&claim, &report(&claim, 0, Update::Started))
        .await?;
    let depth = world.queue.depth().await?;
    assert_eq!((depth.waiting, depth.held, depth.reports), (3, 1, 1));
    world.queue.complete(&claim, &succeeded(&claim)).await?;
    let depth = world.queue.depth().await?;
    assert_eq!((depth.waiting, depth.held, depth.reports), (3, 0, 2));
    Ok(())
}
