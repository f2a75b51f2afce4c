//! Requirements on the class of autosaves, which every implementation of the queue has to meet.

use upperdeck::service::job::{JobId, Order, now_ms};
use upperdeck::service::queue::{Depth, Limits, Place, Withdrawn};

use crate::world::{NO_LIMITS, NOW, Outcome, World, order};

on_both! {
    an_autosave_goes_out_and_ends: NO_LIMITS;
    autosaves_come_after_all_others_of_their_node: NO_LIMITS;
    an_autosave_waits_while_another_order_waits_for_a_limit: Limits { user: 1, ..NO_LIMITS };
    an_autosave_waits_while_another_order_is_not_due: NO_LIMITS;
    autosaves_leave_a_place_of_the_node: Limits { node: 3, ..NO_LIMITS };
    autosaves_leave_a_place_of_the_registry: Limits { registry: 2, ..NO_LIMITS };
    autosaves_leave_a_place_of_their_user: Limits { user: 2, ..NO_LIMITS };
    a_limit_of_one_admits_an_autosave: Limits { user: 1, node: 1, registry: 1 };
    users_take_turns_with_their_autosaves: NO_LIMITS;
    places_of_autosaves_count_all_others: NO_LIMITS;
    an_autosave_is_withdrawn_and_delayed_as_any_order: NO_LIMITS;
}

async fn an_autosave_goes_out_and_ends(world: World) -> Outcome {
    let order = world.offer_autosave("n1", "ada").await?;
    let claim = world.get("n1", "a").await?;
    assert_eq!(claim.order, order);
    world.finish(&claim).await?;
    assert_eq!(world.queue.depth().await?, Depth::default());
    assert!(world.claim("n1", "a").await?.is_none());
    Ok(())
}

async fn autosaves_come_after_all_others_of_their_node(world: World) -> Outcome {
    let auto = world.offer_autosave("n1", "ada").await?;
    let mut wanted = Vec::new();
    for user in ["bob", "ada", "bob"] {
        wanted.push(world.offer("n1", user).await?.job);
    }
    // What waits on another node does not count.
    world.offer("n2", "bob").await?;
    let mut served = Vec::new();
    for _ in 0..3 {
        served.push(world.get("n1", "a").await?.order.job);
    }
    assert!(wanted.iter().all(|job| served.contains(job)), "{served:?}");
    assert_eq!(world.get("n1", "a").await?.order.job, auto.job);

    // In one call as well.
    let auto = world.offer_autosave("n1", "ada").await?;
    let other = world.offer("n1", "bob").await?;
    let got = world.queue.claim("n1", "a", 10, NOW).await?;
    let jobs: Vec<JobId> = got.iter().map(|claim| claim.order.job).collect();
    assert_eq!(jobs, [other.job, auto.job]);
    Ok(())
}

async fn an_autosave_waits_while_another_order_waits_for_a_limit(world: World) -> Outcome {
    world.offer("n1", "ada").await?;
    let running = world.get("n1", "a").await?;
    let second = world.offer("n1", "ada").await?;
    let auto = world.offer_autosave("n1", "bob").await?;
    assert!(world.claim("n1", "a").await?.is_none());
    assert_eq!(world.queue.withdraw(second.job).await?, Withdrawn::Removed);
    assert_eq!(world.get("n1", "a").await?.order.job, auto.job);
    world.finish(&running).await
}

async fn an_autosave_waits_while_another_order_is_not_due(world: World) -> Outcome {
    let later = Order {
        not_before_ms: now_ms() + 60_000,
        ..order("n1", "ada")
    };
    world.queue.offer(&later).await?;
    let auto = world.offer_autosave("n1", "bob").await?;
    assert!(world.claim("n1", "a").await?.is_none());
    world.pass(std::time::Duration::from_secs(61));
    assert_eq!(world.get("n1", "a").await?.order.job, later.job);
    assert_eq!(world.get("n1", "a").await?.order.job, auto.job);
    Ok(())
}

async fn autosaves_leave_a_place_of_the_node(world: World) -> Outcome {
    for user in ["ada", "bob", "cyd"] {
        world.offer_autosave("n1", user).await?;
    }
    let got = world.queue.claim("n1", "a", 10, NOW).await?;
    assert_eq!(got.len(), 2);
    let wanted = world.offer("n1", "ada").await?;
    assert_eq!(world.get("n1", "a").await?.order.job, wanted.job);
    for claim in &got {
        assert!(world.claim("n1", "a").await?.is_none());
        world.finish(claim).await?;
    }
    assert!(world.get("n1", "a").await?.order.autosave);
    Ok(())
}

async fn autosaves_leave_a_place_of_the_registry(world: World) -> Outcome {
    world.offer_autosave("n1", "ada").await?;
    world.offer_autosave("n2", "bob").await?;
    let first = world.get("n1", "a").await?;
    assert!(world.claim("n2", "b").await?.is_none());
    let wanted = world.offer("n2", "cyd").await?;
    let second = world.get("n2", "b").await?;
    assert_eq!(second.order.job, wanted.job);
    world.finish(&second).await?;
    assert!(world.claim("n2", "b").await?.is_none());
    world.finish(&first).await?;
    assert!(world.claim("n2", "b").await?.is_some());
    Ok(())
}

async fn autosaves_leave_a_place_of_their_user(world: World) -> Outcome {
    world.offer_autosave("n1", "ada").await?;
    world.offer_autosave("n2", "ada").await?;
    world.get("n1", "a").await?;
    assert!(world.claim("n2", "b").await?.is_none());
    let wanted = world.offer("n2", "ada").await?;
    assert_eq!(world.get("n2", "b").await?.order.job, wanted.job);
    Ok(())
}

async fn a_limit_of_one_admits_an_autosave(world: World) -> Outcome {
    world.offer_autosave("n1", "ada").await?;
    world.get("n1", "a").await?;
    Ok(())
}

async fn users_take_turns_with_their_autosaves(world: World) -> Outcome {
    for _ in 0..5 {
        world.offer_autosave("n1", "ada").await?;
    }
    world.get("n1", "a").await?;
    // The turns of other orders are not those of autosaves.
    for _ in 0..3 {
        world.offer("n1", "bob").await?;
        world.get("n1", "a").await?;
    }
    world.offer_autosave("n1", "bob").await?;
    assert_eq!(world.get("n1", "a").await?.order.owner, "bob");
    assert_eq!(world.get("n1", "a").await?.order.owner, "ada");
    Ok(())
}

async fn places_of_autosaves_count_all_others(world: World) -> Outcome {
    let mut jobs = Vec::new();
    for (user, count) in [("ada", 3), ("bob", 1)] {
        for _ in 0..count {
            jobs.push(world.offer_autosave("n1", user).await?.job);
        }
    }
    for user in ["ada", "cyd", "cyd"] {
        jobs.push(world.offer("n1", user).await?.job);
    }
    let later = Order {
        not_before_ms: now_ms() + 86_400_000,
        ..order("n2", "ada")
    };
    world.queue.offer(&later).await?;
    let auto = world.offer_autosave("n2", "ada").await?;
    let alone = world.queue.places(&[auto.job]).await?;
    assert_eq!(alone, [Some(Place::Waiting(1))]);
    let mut said = Vec::new();
    for (place, job) in world.queue.places(&jobs).await?.into_iter().zip(&jobs) {
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
    Ok(())
}

async fn an_autosave_is_withdrawn_and_delayed_as_any_order(world: World) -> Outcome {
    let auto = world.offer_autosave("n1", "ada").await?;
    assert_eq!(world.queue.withdraw(auto.job).await?, Withdrawn::Removed);
    let later = Order {
        not_before_ms: now_ms() + 60_000,
        autosave: true,
        ..order("n1", "ada")
    };
    world.queue.offer(&later).await?;
    assert_eq!(world.queue.depth().await?.waiting, 1);
    assert!(world.claim("n1", "a").await?.is_none());
    world.pass(std::time::Duration::from_secs(61));
    let claim = world.get("n1", "a").await?;
    assert_eq!(claim.order.job, later.job);
    assert_eq!(
        world.queue.withdraw(later.job).await?,
        Withdrawn::CancelRequested
    );
    Ok(())
}
