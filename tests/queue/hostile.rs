//! Write access to Redis is not enough to make an agent or a manager act, panic or stall (threats 8 and 14).

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};
use upperdeck::service::job::{
    Answer, JobId, Keys, Message, NextStep, Order, Question, Report, Sealed, Update, Verdict,
};
use upperdeck::service::queue::{Claim, ClaimState, Error, Offered, Queue, Redis};

use crate::server::{KEY, Server};
use crate::support::note;
use crate::world::{
    LONG, NO_LIMITS, NOW, Outcome, World, node, order, report, session, settings, succeeded,
};

async fn world() -> Option<(World, MultiplexedConnection)> {
    let server = Server::start(&[])?;
    let settings = settings();
    let queue = server.queue(NO_LIMITS, &settings);
    let connection = server.connection().await;
    Some((World::of(queue, settings, Box::new(server)), connection))
}

fn key(name: &str) -> String {
    format!("{{upperdeck}}:{name}")
}

fn sealed<T: serde::Serialize>(keys: &str, message: Message, node: &str, what: &T) -> Vec<u8> {
    bytes(
        Keys::parse(keys)
            .unwrap()
            .seal(message, node, what)
            .unwrap(),
    )
}

/// Returns a message in the form in which it is stored in Redis.
fn bytes(sealed: Sealed) -> Vec<u8> {
    [sealed.mac.into_bytes(), sealed.body.into_bytes()].concat()
}

#[tokio::test]
async fn an_order_that_is_not_ours_is_not_acted_on_and_blocks_nothing() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let elsewhere = order("n2", "ada");
    let another = order("n1", "ada");
    let genuine = sealed(KEY, Message::Order, "n1", &another);
    let mut cut = genuine.clone();
    cut.truncate(100);
    let mut changed = genuine.clone();
    let at = changed.len() - 10;
    changed[at] ^= 1;
    let forgeries: [(&str, Vec<u8>); 9] = [
        ("nothing", Vec::new()),
        ("no text", vec![0xff; 200]),
        ("no signature", genuine[64..].to_vec()),
        ("cut", cut),
        ("changed", changed),
        (
            "another key",
            sealed("a key that is not ours", Message::Order, "n1", &another),
        ),
        (
            "another purpose",
            sealed(KEY, Message::Report, "n1", &another),
        ),
        (
            "another node's",
            sealed(KEY, Message::Order, "n2", &elsewhere),
        ),
        ("another job's", genuine),
    ];
    for (what, bytes) in forgeries {
        let mut victim = order("n1", "ada");
        if what == "another node's" {
            // Genuine in everything but where it lies.
            victim.job = elsewhere.job;
        }
        world.queue.offer(&victim).await?;
        let next = world.offer("n1", "ada").await?;
        let _: Value = cmd("SET")
            .arg(key(&format!("order:{}", victim.job)))
            .arg(bytes)
            .query_async(&mut redis)
            .await?;
        let mut got = world.queue.claim("n1", "a", 10, NOW).await?;
        got.extend(world.queue.claim("n1", "a", 10, NOW).await?);
        let jobs: Vec<JobId> = got.iter().map(|claim| claim.order.job).collect();
        assert_eq!(jobs, [next.job], "{what}");
        assert_eq!(world.queue.places(&[victim.job]).await?, [None], "{what}");
        world.finish(&got[0]).await?;
        // Its manager offers it again, and then it is done.
        assert_eq!(world.queue.offer(&victim).await?, Offered::New, "{what}");
        let claim = world.get("n1", "a").await?;
        assert_eq!(claim.order, victim);
        world.finish(&claim).await?;
    }
    let left: Vec<String> = cmd("KEYS")
        .arg(key("order:*"))
        .query_async(&mut redis)
        .await?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

#[tokio::test]
async fn a_fence_that_cannot_be_is_not_given_out() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    for bad in ["9007199254740991", "1e300", "inf", "nan", "-5", "x", ""] {
        let order = world.offer("n1", "ada").await?;
        let _: Value = cmd("HSET")
            .arg(key(&format!("job:{}", order.job)))
            .arg("f")
            .arg(bad)
            .query_async(&mut redis)
            .await?;
        for claim in world.queue.claim("n1", "a", 1, NOW).await? {
            let ahead =
                (claim.fence / 1000).saturating_sub(upperdeck::service::job::now_ms() as u64);
            assert!(ahead < 86_400_000, "{bad}: {}", claim.fence);
            world.finish(&claim).await?;
        }
        assert_eq!(world.queue.places(&[order.job]).await?, [None], "{bad}");
    }
    Ok(())
}

#[tokio::test]
async fn entries_of_others_in_the_streams_are_thrown_away() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let waiting = world.offer("n1", "ada").await?;
    for round in 0..3 {
        for stream in ["stream:n1", "reports"] {
            for fields in [
                vec!["job", "x"],
                vec!["job", "\u{fffd}\n\0"],
                vec!["m", "short", "j", "y", "l", "1"],
                vec!["", ""],
                vec!["bell", "1", "bell", "2"],
            ] {
                let mut add = cmd("XADD");
                add.arg(key(stream)).arg("*").arg(fields);
                for _ in 0..200 {
                    let _: Value = add.query_async(&mut redis).await?;
                }
            }
            let _: Value = cmd("XADD")
                .arg(key(stream))
                .arg("*")
                .arg("job")
                .arg(waiting.job.to_string())
                .query_async(&mut redis)
                .await?;
        }
        let claims = world
            .queue
            .claim("n1", "a", 10, Duration::from_millis(50))
            .await?;
        assert_eq!(claims.len(), usize::from(round == 0));
        for claim in claims {
            assert_eq!(claim.order, waiting);
            let word = report(&claim, 0, Update::Started);
            assert_eq!(world.queue.report(&claim, &word).await?, ClaimState::Held);
        }
        let mut heard = 0;
        while world.queue.depth().await?.reports > 0 {
            heard += world.take_all().await?.len();
        }
        assert_eq!(heard, usize::from(round == 0));
    }
    let left: u64 = cmd("XLEN")
        .arg(key("stream:n1"))
        .query_async(&mut redis)
        .await?;
    assert_eq!(left, 1, "the claim's own");
    Ok(())
}

#[tokio::test]
async fn nodes_and_sessions_that_nobody_signed_are_not_shown() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    world
        .queue
        .heartbeat(&node("n1"), Some(&[session("n1", "aa")]))
        .await?;
    world
        .queue
        .heartbeat(&node("n2"), Some(&[session("n2", "bb")]))
        .await?;
    // Another node's, shown as this one's.
    let beat: Vec<u8> = cmd("GET")
        .arg(key("beat:n1"))
        .query_async(&mut redis)
        .await?;
    let record: Vec<u8> = cmd("HGET")
        .arg(key("sessions:n1"))
        .arg("aa")
        .query_async(&mut redis)
        .await?;
    for (name, beat, record) in [
        ("n2", &beat, &record),
        ("n3", &beat, &record),
        ("\u{1b}[2J", &vec![0; 300], &vec![0; 300]),
    ] {
        let _: Value = cmd("SET")
            .arg(key(&format!("beat:{name}")))
            .arg(beat)
            .query_async(&mut redis)
            .await?;
        // Beside what the node said, and in its place.
        for id in ["aa", "bb", "\u{1b}[2J"] {
            let _: Value = cmd("HSET")
                .arg(key(&format!("sessions:{name}")))
                .arg(id)
                .arg(record)
                .query_async(&mut redis)
                .await?;
        }
        let _: Value = cmd("ZADD")
            .arg(key("nodes"))
            .arg("inf")
            .arg(name)
            .query_async(&mut redis)
            .await?;
    }
    let nodes: Vec<String> = world
        .queue
        .nodes()
        .await?
        .into_iter()
        .map(|one| one.name)
        .collect();
    assert_eq!(nodes, ["n1"]);
    let sessions: Vec<String> = world
        .queue
        .sessions()
        .await?
        .into_iter()
        .map(|one| one.id)
        .collect();
    assert_eq!(sessions, ["aa"]);
    Ok(())
}

/// One session of a node has a record that is too long, signed by another node, or malformed.
#[tokio::test]
async fn what_lies_under_one_session_does_not_hide_the_others() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let all = [
        session("n1", "aa"),
        session("n1", "bb"),
        session("n1", "cc"),
    ];
    world.queue.heartbeat(&node("n1"), Some(&all)).await?;
    for (id, record) in [
        ("bb", vec![b'x'; 1 << 20]),
        ("", vec![0; 9]),
        ("dd", vec![]),
    ] {
        let _: Value = cmd("HSET")
            .arg(key("sessions:n1"))
            .arg(id)
            .arg(record)
            .query_async(&mut redis)
            .await?;
    }
    let mut ids: Vec<String> = world
        .queue
        .sessions()
        .await?
        .into_iter()
        .map(|one| one.id)
        .collect();
    ids.sort();
    assert_eq!(ids, ["aa", "cc"]);
    Ok(())
}

/// A party with the leaked key of one node cannot send messages in the name of other nodes.
#[tokio::test]
async fn a_node_speaks_for_itself_alone() -> Outcome {
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let master = Keys::parse(KEY)?;
    let thief_keys = Keys::parse_node(&master.node_file("n2")?, "n2")?;
    let thief = Redis::with(&server.url(), thief_keys.clone(), NO_LIMITS, settings())?;
    let thief = Queue::Redis(thief);
    let mut redis = server.connection().await;
    let settings = settings();
    let queue = server.queue(NO_LIMITS, &settings);
    let world = World::of(queue, settings, Box::new(()));

    // Neither orders nor words nor sessions of another one.
    let other = order("n1", "ada");
    assert!(thief.offer(&other).await.is_err());
    let question = Question::new(other.job, "n1", 1, 1, NextStep::Tag);
    assert!(thief.ask(&question, NOW).await.is_err());
    let word = Answer {
        question,
        verdict: Verdict::Wanted,
    };
    assert!(thief.answer(&word).await.is_err());
    assert!(thief.heartbeat(&node("n1"), None).await.is_err());
    let foreign = [session("n1", "aa"), session("n2", "bb")];
    thief.heartbeat(&node("n2"), Some(&foreign)).await?;
    let shown = world.queue.sessions().await?;
    let shown: Vec<&str> = shown.iter().map(|one| one.id.as_str()).collect();
    assert_eq!(shown, ["bb"], "what runs on another node is not its to say");

    // Nor the end of another one's job, under whichever name it is put there.
    world.queue.offer(&other).await?;
    let claim = world.get("n1", "a").await?;
    let own = Report {
        node: "n2".to_owned(),
        ..succeeded(&claim)
    };
    let mut reports = Vec::new();
    for (signed, said) in [("n2", &own), ("n2", &succeeded(&claim))] {
        reports.push(bytes(thief_keys.seal(Message::Report, signed, said)?));
    }
    for sealed in &reports {
        for named in ["n1", "n2", ""] {
            let _: Value = cmd("XADD")
                .arg(key("reports"))
                .arg("*")
                .arg("m")
                .arg(sealed)
                .arg("j")
                .arg(other.job.to_string())
                .arg("l")
                .arg("1")
                .arg("n")
                .arg(named)
                .query_async(&mut redis)
                .await?;
        }
    }
    let heard = world.take_all().await?;
    assert!(heard.iter().all(|report| report.node == "n2"), "{heard:?}");
    assert_eq!(world.queue.renew(&claim).await?, ClaimState::Held);
    world.finish(&claim).await
}

/// A manager's answer belongs to one question. A party that sees the question and can write to Redis cannot forge or
/// reuse an answer.
#[tokio::test]
async fn a_word_that_no_manager_said_to_this_question_is_none() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let job = order("n1", "ada").job;
    let question = Question::new(job, "n1", 2, 7, NextStep::Tag);
    let wanted = |question: Question| Answer {
        question,
        verdict: Verdict::Wanted,
    };
    let changed = |change: fn(&mut Question)| {
        let mut question = question.clone();
        change(&mut question);
        sealed(KEY, Message::Answer, "n1", &wanted(question))
    };
    let whole = wanted(question.clone());
    let forgeries: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("no text", vec![0xff; 200]),
        ("large", vec![b'a'; 1 << 20]),
        (
            "another key",
            sealed("a key that is not ours", Message::Answer, "n1", &whole),
        ),
        ("another node's", sealed(KEY, Message::Answer, "n2", &whole)),
        ("an order", sealed(KEY, Message::Order, "n1", &whole)),
        (
            "the question",
            sealed(KEY, Message::Question, "n1", &question),
        ),
        (
            "an earlier question's",
            changed(|q| q.nonce = "00".repeat(16)),
        ),
        ("another attempt's", changed(|q| q.attempt = 1)),
        ("another claim's", changed(|q| q.fence = 6)),
        ("another job's", changed(|q| q.job = JobId::new())),
        ("before the save", changed(|q| q.before = NextStep::Save)),
    ];
    for (what, forged) in &forgeries {
        let _: Value = cmd("RPUSH")
            .arg(key(&format!("answer:{}", question.nonce)))
            .arg(forged)
            .query_async(&mut redis)
            .await?;
        let answer = world
            .queue
            .ask(&question, Duration::from_millis(50))
            .await?;
        assert_eq!(answer, None, "{what}");
    }
    // Forged questions get no answer, and block nothing.
    for junk in [&b""[..], b"n1", b"n1\0", b"\xff\0x", &[b'a'; 9000]] {
        let _: Value = cmd("RPUSH")
            .arg(key("asks"))
            .arg(junk)
            .query_async(&mut redis)
            .await?;
    }
    let manager = world.queue.clone();
    let answering = tokio::spawn(async move {
        let mut seen = 0;
        loop {
            for question in manager.questions(Duration::from_millis(50)).await? {
                seen += 1;
                let verdict = Verdict::Superseded;
                let fresh = question.attempt == 3;
                manager.answer(&Answer { question, verdict }).await?;
                if fresh {
                    return Ok::<usize, Error>(seen);
                }
            }
        }
    });
    let fresh = Question::new(job, "n1", 3, 8, NextStep::Save);
    let answer = world.queue.ask(&fresh, LONG).await?.ok_or("no answer")?;
    assert_eq!(
        (answer.question, answer.verdict),
        (fresh, Verdict::Superseded)
    );
    assert_eq!(answering.await??, forgeries.len() + 1);
    // Of another kind than they are, they are made anew.
    for name in ["asks".to_owned(), format!("answer:{}", question.nonce)] {
        let _: Value = cmd("SET")
            .arg(key(&name))
            .arg("x")
            .query_async(&mut redis)
            .await?;
    }
    world.queue.questions(Duration::from_millis(1)).await?;
    world.queue.ask(&question, Duration::from_millis(1)).await?;
    assert_eq!(world.queue.questions(LONG).await?, [question]);
    Ok(())
}

/// Sessions with an old but genuine signature are rejected.
#[tokio::test]
async fn an_old_inventory_is_not_shown_again() -> Outcome {
    let Some((world, _redis)) = world().await else {
        return Ok(());
    };
    for (minutes, shown) in [(5, 1), (15, 0)] {
        let mut then = node("n1");
        then.at_ms -= minutes * 60_000;
        world
            .queue
            .heartbeat(&then, Some(&[session("n1", "aa")]))
            .await?;
        assert_eq!(world.queue.sessions().await?.len(), shown, "{minutes}");
    }
    Ok(())
}

/// Replaces every key by one of each other type.
#[tokio::test]
async fn a_key_of_another_kind_is_thrown_away() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let kinds: [(&str, &[&str]); 4] = [
        ("SET", &["x"]),
        ("RPUSH", &["x"]),
        ("ZADD", &["1", "x"]),
        ("HSET", &["s", "h"]),
    ];
    let names = [
        "stream:n1",
        "held:n1",
        "later:n1",
        "users:n1",
        "desk:n1",
        "agents:n1",
        "list:2:n1:ada",
        "user:ada",
        "into:registry.example.org",
        "blocked",
        "busy",
        "reports",
        "nodes",
    ];
    for name in names {
        for (make, what) in kinds {
            let _: Value = cmd("DEL").arg(key(name)).query_async(&mut redis).await?;
            let _: Value = cmd(make)
                .arg(key(name))
                .arg(what)
                .query_async(&mut redis)
                .await?;
            // One at a time may still find out about it.
            let order = world.offer("n1", "ada").await?;
            let _ = world
                .queue
                .claim("n1", "a", 10, Duration::from_millis(5))
                .await;
            if world.queue.places(&[order.job]).await? == [None] {
                world.queue.offer(&order).await?;
            }
            world.pass_lease();
            let mut got = world.queue.claim("n1", "a", 100, NOW).await?;
            let claim = got
                .iter()
                .position(|claim| claim.order.job == order.job)
                .map(|at| got.swap_remove(at))
                .ok_or_else(|| format!("{name} as {make} stands in the way"))?;
            world.finish(&claim).await?;
            world.queue.heartbeat(&node("n1"), None).await?;
            assert_eq!(world.queue.nodes().await?.len(), 1);
            world.queue.depth().await?;
        }
    }
    Ok(())
}

/// Replaces random data in Redis by random bytes. What is read is what was written, or nothing.
#[tokio::test]
async fn garbled_keys_never_act_nor_stand_in_the_way() -> Outcome {
    let Some((world, mut redis)) = world().await else {
        return Ok(());
    };
    let seed: u64 = rand::random();
    note(&format!("seed {seed}"));
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut orders: BTreeMap<JobId, Order> = BTreeMap::new();
    let mut claims: Vec<Claim> = Vec::new();
    for round in 0..400 {
        let order = order("n1", ["ada", "bob"].choose(&mut rng).unwrap());
        world.queue.offer(&order).await?;
        orders.insert(order.job, order);
        if round % 3 == 0 {
            claims.extend(world.queue.claim("n1", "a", 3, NOW).await?);
        }
        garble(&mut redis, &mut rng).await?;
        for claim in world
            .queue
            .claim("n1", "b", 2, Duration::from_millis(1))
            .await?
        {
            claims.push(claim);
        }
        claims.extend(world.queue.reclaim("n1", "b").await?);
        for claim in &claims {
            assert_eq!(Some(&claim.order), orders.get(&claim.order.job));
        }
        if let Some(claim) = claims.choose(&mut rng).cloned() {
            world.queue.renew(&claim).await?;
            world.queue.confirm(&claim).await?;
            world
                .queue
                .report(&claim, &report(&claim, 0, Update::Started))
                .await?;
            world.queue.withdraw(claim.order.job).await?;
            world.queue.complete(&claim, &succeeded(&claim)).await?;
        }
        let jobs: Vec<JobId> = orders.keys().copied().collect();
        world.queue.places(&jobs).await?;
        world
            .queue
            .heartbeat(&node("n1"), Some(&[session("n1", "aa")]))
            .await?;
        for report in world.take_all().await? {
            assert!(orders.contains_key(&report.job));
        }
        assert!(world.queue.nodes().await?.len() <= 1);
        world.queue.sessions().await?;
        world.queue.depth().await?;
    }
    // And then a save goes through, behind whatever is left.
    let last = world.offer("n1", "cyd").await?;
    for _ in 0..500 {
        for claim in world.queue.claim("n1", "c", 10, NOW).await? {
            world.queue.complete(&claim, &succeeded(&claim)).await?;
            if claim.order == last {
                return Ok(());
            }
        }
    }
    Err("it stands still".into())
}

/// Makes one random change to a random key.
async fn garble(redis: &mut MultiplexedConnection, rng: &mut SmallRng) -> Outcome {
    let Some(name): Option<Vec<u8>> = cmd("RANDOMKEY").query_async(redis).await? else {
        return Ok(());
    };
    let kind: String = cmd("TYPE").arg(&name).query_async(redis).await?;
    let noise: Vec<u8> = match rng.random_range(0..4) {
        0 => Vec::new(),
        1 => b"-1".to_vec(),
        2 => b"1e999".to_vec(),
        _ => (0..rng.random_range(1..80)).map(|_| rng.random()).collect(),
    };
    let score = ["inf", "-inf", "1", "-7.5", "9e18"].choose(rng).unwrap();
    let mut change = cmd("DEL");
    match kind.as_str() {
        "string" => {
            let mut value: Vec<u8> = cmd("GET").arg(&name).query_async(redis).await?;
            if rng.random_bool(0.5) && !value.is_empty() {
                let at = rng.random_range(0..value.len());
                value[at] ^= 1 << rng.random_range(0..8);
            } else {
                value = noise;
            }
            change = cmd("SET");
            change.arg(&name).arg(value);
        }
        "hash" => {
            let field = [
                "s", "n", "u", "r", "f", "x", "g", "e", "k", "v", "lu", "ln", "want",
            ];
            change = cmd("HSET");
            change.arg(&name).arg(field.choose(rng).unwrap()).arg(noise);
        }
        "zset" => {
            let some: Option<Vec<u8>> = cmd("ZRANDMEMBER")
                .arg(&name)
                .query_async(redis)
                .await
                .unwrap_or(None);
            change = cmd("ZADD");
            change.arg(&name).arg(score);
            match some {
                Some(some) if rng.random_bool(0.5) => change.arg(some),
                _ => change.arg(noise),
            };
        }
        "list" => {
            change = cmd("LPUSH");
            change.arg(&name).arg(noise);
        }
        "set" => {
            change = cmd("SADD");
            change.arg(&name).arg(noise);
        }
        "stream" => {
            change = cmd("XADD");
            change.arg(&name).arg("*").arg("m").arg(noise);
        }
        _ => {}
    }
    if change.args_iter().count() == 1 || rng.random_bool(0.1) {
        change = cmd("DEL");
        change.arg(&name);
    }
    let _: Value = change.query_async(redis).await?;
    Ok(())
}

#[tokio::test]
async fn passwords_are_in_no_error() -> Outcome {
    let Some(server) = Server::start(&["--requirepass", "open-sesame"]) else {
        return Ok(());
    };
    let mut urls = vec![
        (
            "redis://ada:s3cret-pass@127.0.0.1:1/0".to_owned(),
            "127.0.0.1:1",
        ),
        (
            "redis+unix:///nowhere/x.sock?pass=s3cret-pass".to_owned(),
            "/nowhere/x.sock",
        ),
    ];
    let socket = server.socket().display().to_string();
    urls.push((format!("redis+unix://{socket}?pass=s3cret-pass"), &socket));
    urls.push((
        format!("redis+unix://{socket}?user=eve&pass=s3cret-pass"),
        &socket,
    ));
    for (url, at) in urls {
        let queue = Queue::Redis(Redis::connect(&url, Keys::parse(KEY)?, NO_LIMITS).await?);
        let error = queue.ping().await.err().ok_or("it answered")?;
        let said = format!("{error} {error:?}");
        assert!(!said.contains("s3cret") && said.contains(at), "{said}");
        let right_kind = match &error {
            Error::Refused { .. } => at == socket,
            Error::Unreachable { .. } => at != socket,
            Error::Unusable(_) => false,
        };
        assert!(right_kind, "{said}");
        let waiting = queue.claim("n1", "a", 1, Duration::from_millis(10)).await;
        assert!(!format!("{:?}", waiting.err()).contains("s3cret"));
    }
    for url in [
        "http://u:s3cret-pass@x/",
        "redis://u:s3cret-pass@x:port/",
        "s3cret-pass",
        "",
    ] {
        let error = Redis::connect(url, Keys::parse(KEY)?, NO_LIMITS)
            .await
            .err()
            .ok_or("usable")?;
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
    }
    let right = format!("redis+unix://{socket}?pass=open-sesame");
    let queue = Queue::Redis(Redis::connect(&right, Keys::parse(KEY)?, NO_LIMITS).await?);
    queue.ping().await?;
    assert_eq!(queue.offer(&order("n1", "ada")).await?, Offered::New);
    Ok(())
}
