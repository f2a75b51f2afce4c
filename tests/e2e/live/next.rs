//! `upperdeck inspect` predicts the next save, and the save matches the prediction.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Session, layers};
use crate::host::image::Base;
use crate::host::run;
use crate::save;

/// Returns the prediction for some of the flags of a save.
fn predicted(session: &Session, flags: &[&str]) -> Result<Value> {
    let mut inspect = save::upperdeck("inspect", &session.roots);
    inspect
        .args(flags)
        .args(["--format", "json", &session.container.id]);
    let view: Value = serde_json::from_str(&run(&mut inspect)?)?;
    ensure!(view["next_save_error"].is_null(), "{view}");
    Ok(view["next_save"].clone())
}

/// Compares the prediction with the save that is then made. Returns the reason in the prediction.
fn prediction_holds(session: &Session, tag: &str, kind: &str, flags: &[&str]) -> Result<String> {
    let next = predicted(session, flags)?;
    ensure!(next["kind"] == kind, "{tag}: {next}");
    let saved = session.save(tag, flags)?;
    let sum = |name: &str| -> u64 {
        let layers = saved.metadata["layers"].as_array().into_iter().flatten();
        layers.filter_map(|layer| layer[name].as_u64()).sum()
    };
    ensure!(
        next["bytes"] == sum("tar_size_bytes")
            && next["entries"] == sum("entries")
            && next["layers"] == saved.metadata["layers_above_base"],
        "{tag}: {next} was to come, and it was {}",
        saved.metadata
    );
    // The first save does not report that it is full, because there is no earlier one.
    let anew = saved.stderr.contains("saved anew");
    ensure!(
        anew == (kind == "full" && tag != "first"),
        "{}",
        saved.stderr
    );
    session.same(&saved)?;
    // A delta contains only what changed, so its figures are not those of a full save.
    ensure!(kind == "full" || sum("tar_size_bytes") < 100_000);
    ensure!(kind == "delta" || (layers(&saved) == 1 && sum("tar_size_bytes") > 2_000_000));
    next["reason"]
        .as_str()
        .map(str::to_owned)
        .context("a reason")
}

#[test]
fn what_inspect_foretells_the_next_save_is() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let short = ["--max-layers", "3"];
    let reason = prediction_holds(&session, "first", "full", &short)?;
    ensure!(reason.contains("no state of an earlier save"), "{reason}");
    prediction_holds(&session, "nothing", "delta", &short)?;
    let again = predicted(&session, &short)?;
    ensure!(
        again["bytes"] == 0 && again["entries"] == 0 && again["layers"] == 1,
        "nothing changed: {again}"
    );
    for change in ["one", "two"] {
        let script =
            format!("echo {change} > /opt/{change}; rm -rf /srv/dash; echo > /srv/{change}");
        session.podman.shell(&session.container, &script)?;
        let next = predicted(&session, &short)?;
        ensure!(
            next["entries"].as_u64() > Some(0),
            "something changed: {next}"
        );
        prediction_holds(&session, change, "delta", &short)?;
    }
    // Three layers: the chain ends, unless a higher maximum is given.
    ensure!(predicted(&session, &["--max-layers", "4"])?["kind"] == "delta");
    let all = predicted(&session, &["--full"])?;
    ensure!(all["kind"] == "full", "{all}");
    let reason = prediction_holds(&session, "cap", "full", &short)?;
    ensure!(reason.contains("3 layers"), "{reason}");
    let reason = prediction_holds(&session, "after", "delta", &short)?;
    ensure!(reason.contains("can be built on"), "{reason}");
    Ok(())
}
