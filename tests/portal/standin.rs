//! A manager whose behavior the test determines. The page is the real one, and the responses use the API's own types,
//! so their format cannot differ from a manager's.
#![allow(
    clippy::result_large_err,
    reason = "an answer is an answer, whichever way it leaves a handler"
)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::extract::{Path, Query, State as Given};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use jiff::{SignedDuration, Timestamp};
use tokio::runtime::Runtime;
use upperdeck::image::packages::Packages;
use upperdeck::service::job::{
    Category, Code, JobId, Kind, Load, NextSave, Phase, Saved, State, Unsaved,
};
use upperdeck::service::manager::api::Replace;
use upperdeck::service::manager::api::{
    AutosaveSetting, ExistingImage, ImageChange, ImageFate, ImageState, ImageTag, ImageView,
    Images, Me, NodeView, Nodes, Problem, Progress, Quota, Save, SaveError, SaveRequest, Saves,
    SessionEndView, SessionView, Sessions, Warning, Which,
};
use upperdeck::service::manager::auth::Via;
use upperdeck::service::record::MadeBy;

use crate::browser::Outcome;

const STEP: Duration = Duration::from_millis(60);
/// Interval between two lists of open saves in a stream.
const LIST_EVERY: Duration = Duration::from_secs(5);
const TOTAL: u64 = 1_240_000_000;

/// Data and behavior of the stand-in.
pub struct World {
    pub me: Me,
    pub signed_in: bool,
    pub sessions: Vec<SessionView>,
    pub saves: Vec<Save>,
    pub images: Vec<ImageView>,
    /// Images that others share.
    pub shared: Vec<ImageView>,
    pub quota: Quota,
    pub nodes: Vec<NodeView>,
    pub dead: Vec<JobId>,
    /// Saves stop at this share of their bytes until it is changed.
    pub hold_at: Option<f64>,
    /// The failure of the next saves; `None`: they succeed.
    pub fails: Option<Code>,
    /// The error response to the next `POST /saves`.
    pub refuse: Option<(StatusCode, Problem)>,
    /// Number of changing requests without the page's own header. Must be 0.
    pub forged: u32,
    /// Every request to the API: its method and its path with the query.
    pub calls: Vec<String>,
    /// Streams begin, and then say nothing.
    pub mute: bool,
    /// The requests for saves as received.
    pub asked: Vec<SaveRequest>,
    /// Lists of packages by `ID` of a session or save, or `ID since ID`.
    pub packages: HashMap<String, Packages>,
    /// The settings for autosaves as received; the default is the one of a request that removes them.
    pub settings: Vec<AutosaveSetting>,
    /// What the user set for all own sessions.
    pub own: Option<AutosaveSetting>,
    keys: HashMap<String, JobId>,
}

pub type Shared = Arc<Mutex<World>>;

/// The running stand-in. It can be ended and started again at the same address.
pub struct Standin {
    pub world: Shared,
    pub address: SocketAddr,
    runtime: Option<Runtime>,
}

pub fn ago(seconds: i64) -> String {
    (Timestamp::now() - SignedDuration::from_secs(seconds)).to_string()
}

impl World {
    pub fn session(
        kind: Kind,
        category: Category,
        pod: &str,
        node: &str,
        started: i64,
    ) -> SessionView {
        SessionView {
            id: format!(
                "{:0>64}",
                format!(
                    "{:x}",
                    pod.bytes().fold(7_u64, |sum, byte| sum
                        .wrapping_mul(31)
                        .wrapping_add(u64::from(byte)))
                )
            ),
            node: node.to_owned(),
            owner: Some("minji".to_owned()),
            namespace: Some("hub".to_owned()),
            pod: Some(pod.to_owned()),
            container: Some("notebook".to_owned()),
            runtime: "containerd".to_owned(),
            kind,
            category,
            image: Some("registry.example.org/centre/pytorch-notebook:2026a".to_owned()),
            started: ago(started),
            ended: None,
            upper_bytes: Some(4_812_000_000),
            upper_entries: Some(31_877),
            next: None,
            unsaved: vec![],
            unsaved_more: 0,
            problem: None,
            suggested_name: pod.to_owned(),
            suggested_tag: "2026-11-24-1530".to_owned(),
            save: None,
            autosave: None,
            autosave_from: None,
            save_on_end: None,
        }
    }

    /// Has the second session end.
    pub fn end_session(&mut self, out_of_memory: bool) {
        self.sessions[1].ended = Some(SessionEndView {
            at: Some(ago(185)),
            exit_code: Some(if out_of_memory { 137 } else { 1 }),
            out_of_memory,
            save: false,
        });
    }

    fn new() -> Self {
        let mount = |path: &str, kind: &str, data: bool| Unsaved {
            path: path.to_owned(),
            kind: kind.to_owned(),
            data,
        };
        let mut training = Self::session(
            Kind::Jupyter,
            Category::Gpu,
            "jupyter-minji-training",
            "gpu-03",
            11_500,
        );
        training.next = Some(NextSave {
            delta: true,
            bytes: Some(TOTAL),
            entries: Some(31_877),
            times_only: false,
            last_seconds: Some(41.0),
        });
        training.unsaved = vec![
            mount("/home/minji", "nfs4", true),
            mount("/scratch", "lustre", true),
            mount("/proc", "proc", false),
            mount("/dev/shm", "tmpfs", false),
            mount("/run/secrets", "tmpfs", false),
        ];
        let mut statistics = Self::session(
            Kind::Rstudio,
            Category::Cpu,
            "rstudio-minji",
            "cpu-11",
            260_000,
        );
        statistics.image = Some("registry.example.org/centre/rstudio:4.4".to_owned());
        statistics.upper_bytes = Some(318_000_000);
        statistics.next = Some(NextSave {
            delta: false,
            bytes: Some(318_000_000),
            entries: Some(31_877),
            times_only: false,
            last_seconds: None,
        });
        statistics.unsaved = vec![mount("/proc", "proc", false)];
        let mut world = Self {
            me: Me {
                user: "minji".to_owned(),
                administrator: false,
                via: Via::SignIn,
                groups: vec![],
                start_url: None,
                email: None,
            },
            signed_in: true,
            sessions: vec![training, statistics],
            saves: vec![],
            images: vec![],
            shared: vec![],
            quota: Quota {
                used: Some(32_400_000_000),
                hard: Some(50_000_000_000),
                scope: "minji".to_owned(),
            },
            nodes: vec![],
            dead: vec![],
            hold_at: None,
            fails: None,
            refuse: None,
            forged: 0,
            calls: vec![],
            mute: false,
            asked: vec![],
            packages: HashMap::new(),
            settings: vec![],
            own: None,
            keys: HashMap::new(),
        };
        world.images = vec![
            world.image(
                "pytorch-lora",
                &["2026-11-20", "paper"],
                Category::Gpu,
                9_100_000_000,
                345_600,
                Some("Fine-tuning as in the paper: transformers 4.60, flash-attn, tokenizer fixed"),
            ),
            world.image(
                "jupyter-minji-training",
                &["2026-11-23-1804"],
                Category::Gpu,
                8_700_000_000,
                76_000,
                None,
            ),
            world.image(
                "rstudio-minji",
                &["2026-10-02"],
                Category::Cpu,
                2_300_000_000,
                4_600_000,
                Some("lme4, brms, cmdstan"),
            ),
        ];
        world.images[0].tags[1].immutable = true;
        world
    }

    pub fn image(
        &self,
        name: &str,
        tags: &[&str],
        category: Category,
        size: u64,
        changed: i64,
        message: Option<&str>,
    ) -> ImageView {
        let repository = format!("registry.example.org/minji/{name}");
        ImageView {
            user: self.me.user.clone(),
            name: name.to_owned(),
            tags: tags
                .iter()
                .map(|tag| ImageTag {
                    name: (*tag).to_owned(),
                    reference: format!("{repository}:{tag}"),
                    immutable: false,
                })
                .collect(),
            digest: format!("sha256:{:0<64}", format!("{:x}", size ^ changed as u64)),
            repository,
            size: Some(size),
            category: Some(category),
            kind: Some(Kind::Jupyter),
            base: Some("registry.example.org/centre/pytorch-notebook:2026a".to_owned()),
            pulls: Some(size / 1_000_000_000),
            changed: Some(ago(changed)),
            message: message.map(str::to_owned),
            session_name: Some(format!("hub/{name}/notebook")),
            save: None,
            pinned: false,
            shared: vec![],
            shared_groups: vec![],
        }
    }

    fn begin(&mut self, request: &SaveRequest) -> Result<Save, (StatusCode, Problem)> {
        if let Some(refusal) = self.refuse.take() {
            return Err(refusal);
        }
        let Which::Id(id) = &request.session else {
            return Err(refusal(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid",
                "session",
            ));
        };
        let me = self.me.user.clone();
        let Some(session) = self.sessions.iter_mut().find(|session| session.id == *id) else {
            return Err(refusal(
                StatusCode::NOT_FOUND,
                "not_found",
                "no such session",
            ));
        };
        if let Some(save) = session.save {
            let (status, mut detail) =
                refusal(StatusCode::CONFLICT, "conflict", "it is being saved");
            detail.save = Some(save);
            return Err((status, detail));
        }
        let name = request
            .image
            .name
            .clone()
            .unwrap_or_else(|| session.suggested_name.clone());
        let mut tag = request
            .image
            .tag
            .clone()
            .unwrap_or_else(|| session.suggested_tag.clone());
        let there = |tag: &str| {
            let mut all = self.images.iter().filter(|image| image.name == name);
            all.find(|image| image.tags.iter().any(|one| one.name == tag))
        };
        let taken = there(&tag);
        if request.image.tag.is_none() && taken.is_some() {
            tag = format!("{tag}-{:04x}", self.saves.len());
        } else if let Some(image) = taken {
            let by = self.saves.iter().find(|save| Some(save.id) == image.save);
            let allowed = match &request.replace {
                Replace::Any => true,
                Replace::Never => false,
                Replace::Own => by.is_some_and(|save| save.session == *id),
                Replace::Image(digest) => digest.to_string() == image.digest,
            };
            if !allowed {
                let (status, mut detail) =
                    refusal(StatusCode::CONFLICT, "tag_exists", "the tag exists");
                detail.existing = Some(Box::new(ExistingImage {
                    name: name.clone(),
                    tag,
                    digest: image.digest.clone(),
                    user: image.user.clone(),
                    saved: image.changed.clone(),
                    session: by.map(|save| save.session.clone()),
                    session_name: image.session_name.clone(),
                    save: image.save,
                    message: image.message.clone(),
                }));
                return Err((status, detail));
            }
        }
        let save = Save {
            id: JobId::new(),
            session: id.clone(),
            session_name: format!("hub/{}/notebook", session.pod.clone().unwrap_or_default()),
            node: session.node.clone(),
            user: me.clone(),
            target: format!("registry.example.org/{me}/{name}:{tag}"),
            name,
            tag,
            message: request.message.clone(),
            made_by: MadeBy::User,
            state: State::Queued,
            phase: None,
            since: Some(ago(0)),
            place: Some(2),
            waiting: None,
            attempt: 1,
            progress: None,
            pause_ms: None,
            warnings: vec![],
            result: None,
            error: None,
            image: None,
            cancelling: false,
            hurried: false,
            can_hurry: false,
            created: ago(0),
            started: None,
            finished: None,
            version: 1,
        };
        session.save = Some(save.id);
        self.saves.insert(0, save.clone());
        Ok(save)
    }

    /// Adds a save that ended some time ago.
    pub fn ended(
        &mut self,
        session: usize,
        state: State,
        code: Option<Code>,
        seconds: i64,
    ) -> Save {
        let session = self.sessions[session].id.clone();
        let request = SaveRequest {
            session: Which::Id(session),
            image: upperdeck::service::manager::api::ImageName::default(),
            message: None,
            options: upperdeck::service::job::SaveOptions::default(),
            replace: upperdeck::service::manager::api::Replace::default(),
            notify: None,
        };
        let Ok(save) = self.begin(&request) else {
            panic!("it is being saved")
        };
        let save = self.end(save.id, state, code);
        let at = self.saves.iter_mut().find(|one| one.id == save.id).unwrap();
        at.created = ago(seconds);
        at.finished = Some(ago(seconds - 40));
        at.clone()
    }

    pub fn end(&mut self, id: JobId, state: State, code: Option<Code>) -> Save {
        let save = self.saves.iter_mut().find(|save| save.id == id).unwrap();
        save.state = state;
        save.version += 1;
        save.phase = None;
        save.place = None;
        save.finished = Some(ago(0));
        save.cancelling = false;
        save.pause_ms = Some(34.2);
        if state == State::Succeeded {
            save.progress = Some(Progress {
                bytes_done: TOTAL,
                bytes_total: TOTAL,
                bytes_sent: TOTAL / 3,
                entries_total: 4_211,
                base_done: 0,
                base_total: 0,
                rate: None,
                seconds_left: None,
            });
            save.warnings = vec![Warning {
                code: "credentials_left_out".to_owned(),
                message: "2 paths with credentials are left out, e.g. /root/.ssh".to_owned(),
            }];
            save.result = Some(Saved {
                reference: format!("{}@{}", save.target, digest_of(id)),
                digest: digest_of(id),
                layer_bytes: 402_000_000,
                image_bytes: 8_900_000_000,
                sent_bytes: 402_000_000,
                entries: 4_211,
                delta: true,
                base_name: Some("registry.example.org/centre/pytorch-notebook:2026a".to_owned()),
                pause_ms: Some(34.2),
                seconds: 39.5,
                ..Saved::default()
            });
        }
        save.error = code.map(|code| SaveError {
            code,
            message: format!(
                "{}: the registry at registry.example.org says so",
                code.name()
            ),
            retryable: false,
        });
        let save = save.clone();
        for session in &mut self.sessions {
            if session.save == Some(id) {
                session.save = None;
            }
        }
        if state == State::Succeeded {
            let category = self
                .sessions
                .iter()
                .find(|one| one.id == save.session)
                .map_or(Category::Cpu, |one| one.category);
            let mut image = self.image(
                &save.name,
                &[&save.tag],
                category,
                8_900_000_000,
                0,
                save.message.as_deref(),
            );
            image.session_name = Some(save.session_name.clone());
            image.save = Some(id);
            image.digest = digest_of(id);
            self.take_tag(&save);
            image.repository = save
                .target
                .rsplit_once(':')
                .map(|(repository, _)| repository.to_owned())
                .unwrap_or_default();
            self.images.insert(0, image);
        }
        save
    }

    /// Takes the tag of a save from the image that had it.
    fn take_tag(&mut self, by: &Save) {
        for image in &mut self.images {
            if image.name == by.name {
                image.tags.retain(|tag| tag.name != by.tag);
            }
        }
        for save in &mut self.saves {
            if save.id != by.id && save.target == by.target && save.result.is_some() {
                save.image = Some(ImageFate {
                    state: ImageState::Replaced,
                    at: Some(ago(0)),
                    save: Some(by.id),
                    session_name: Some(by.session_name.clone()),
                    caller: None,
                    renamed_to: None,
                });
            }
        }
    }

    /// Advances every open save by one step.
    fn step(&mut self) {
        let going: Vec<JobId> = self
            .saves
            .iter()
            .filter(|save| !save.state.is_final())
            .map(|save| save.id)
            .collect();
        for id in going {
            let (hold, fails) = (self.hold_at, self.fails);
            let save = self.saves.iter_mut().find(|save| save.id == id).unwrap();
            if save.cancelling {
                self.end(id, State::Cancelled, None);
                continue;
            }
            let done = save.progress.map_or(0, |progress| progress.bytes_done);
            let mut changed = true;
            match (save.state, save.phase) {
                (State::Queued, _) if save.place.unwrap_or(0) > 0 => {
                    save.place = save.place.map(|place| place - 1);
                    changed = false;
                }
                (State::Queued, _) => {
                    save.state = State::Assigned;
                    save.place = None;
                }
                (State::Assigned, _) => {
                    save.state = State::Running;
                    save.started = Some(ago(0));
                    save.phase = Some(Phase::Locating);
                }
                (_, Some(Phase::Locating)) => save.phase = Some(Phase::Scanning),
                (_, Some(Phase::Scanning)) => {
                    save.phase = Some(Phase::Streaming);
                    save.progress = Some(Progress {
                        bytes_total: TOTAL,
                        ..Progress::default()
                    });
                }
                (_, Some(Phase::Streaming)) if done < TOTAL => {
                    changed = false;
                    if hold.is_none_or(|share| (done as f64) < share * TOTAL as f64) {
                        let done = (done + TOTAL / 40).min(TOTAL);
                        save.progress = Some(Progress {
                            bytes_done: done,
                            bytes_total: TOTAL,
                            bytes_sent: done / 3,
                            entries_total: 4_211,
                            base_done: 0,
                            base_total: 0,
                            rate: Some(154_000_000.0),
                            seconds_left: Some((TOTAL - done) as f64 / 154_000_000.0),
                        });
                    }
                }
                (_, Some(Phase::Streaming)) => match fails {
                    None => save.phase = Some(Phase::Finishing),
                    Some(code) => {
                        self.end(id, State::Failed, Some(code));
                        continue;
                    }
                },
                (_, Some(Phase::Base)) if hold.is_some() => changed = false,
                _ => {
                    self.end(id, State::Succeeded, None);
                    continue;
                }
            }
            if changed {
                let save = self.saves.iter_mut().find(|save| save.id == id).unwrap();
                save.version += 1;
            }
        }
    }

    pub fn node(name: &str, alive: bool) -> NodeView {
        NodeView {
            name: name.to_owned(),
            version: "0.1.0".to_owned(),
            started: ago(1_000_000),
            heard: ago(if alive { 3 } else { 4_000 }),
            alive,
            draining: false,
            sessions: 14,
            running: vec![],
            waiting: 0,
            load: Load {
                cores: 64,
                cpu_pressure: Some(3.2),
                io_pressure: Some(0.4),
                load1: 21.34,
                slots: 3,
                threads: 12,
                background: true,
                hurry: true,
            },
            problems: vec![],
            ended_more: 0,
        }
    }
}

fn digest_of(id: JobId) -> String {
    format!("sha256:{:0<64}", id.to_string().replace('-', ""))
}

pub fn refusal(status: StatusCode, code: &str, message: &str) -> (StatusCode, Problem) {
    let detail = Problem::new(status.as_u16(), code, message);
    (status, detail)
}

pub fn refuse((status, problem): (StatusCode, Problem)) -> Response {
    let kind = [("content-type", "application/problem+json")];
    (status, kind, serde_json::to_string(&problem).unwrap()).into_response()
}

pub type Reply = Result<Response, Response>;

/// Called by every handler: checks the sign-in, and whether the page itself requested a change.
pub fn enter<'a>(
    world: &'a Shared,
    headers: &HeaderMap,
    changes: bool,
) -> Result<MutexGuard<'a, World>, Response> {
    let mut world = world.lock().unwrap();
    if changes
        && (headers.get("upperdeck-request").is_none()
            || headers
                .get("content-type")
                .is_none_or(|kind| kind != "application/json"))
    {
        world.forged += 1;
    }
    if world.signed_in {
        Ok(world)
    } else {
        Err(refuse(refusal(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "no token",
        )))
    }
}

async fn me(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    Ok(Json(enter(&world, &headers, false)?.me.clone()).into_response())
}

async fn sessions(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let sessions = enter(&world, &headers, false)?.sessions.clone();
    Ok(Json(Sessions {
        sessions,
        next: None,
    })
    .into_response())
}

async fn save(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Json(request): Json<SaveRequest>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let key = headers
        .get("idempotency-key")
        .and_then(|key| key.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    if let Some(id) = world.keys.get(&key) {
        let same = world.saves.iter().find(|save| save.id == *id).cloned();
        return Ok((StatusCode::ACCEPTED, Json(same)).into_response());
    }
    world.asked.push(request.clone());
    let save = world.begin(&request).map_err(refuse)?;
    world.keys.insert(key, save.id);
    Ok((StatusCode::ACCEPTED, Json(save)).into_response())
}

async fn saves(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Query(query): Query<HashMap<String, String>>,
) -> Reply {
    let world = enter(&world, &headers, false)?;
    let wanted = query.get("state").and_then(|name| State::from_name(name));
    let limit = query
        .get("limit")
        .and_then(|limit| limit.parse().ok())
        .unwrap_or(50);
    let all: Vec<_> = world
        .saves
        .iter()
        .filter(|save| wanted.is_none_or(|state| save.state == state))
        .filter(|save| {
            !save.state.is_final() || query.get("state").is_none_or(|state| state != "open")
        })
        .filter(|save| {
            query
                .get("cursor")
                .is_none_or(|after| save.id.to_string() < *after)
        })
        .collect();
    let next = (all.len() > limit).then(|| all[limit - 1].id.to_string());
    let saves = all.into_iter().take(limit).cloned().collect();
    Ok(Json(Saves { saves, next }).into_response())
}

fn find(world: &World, id: &str) -> Result<Save, Response> {
    world
        .saves
        .iter()
        .find(|save| save.id.to_string() == id)
        .cloned()
        .ok_or_else(|| refuse(refusal(StatusCode::NOT_FOUND, "not_found", "no such save")))
}

async fn check(Given(world): Given<Shared>, headers: HeaderMap, Path(id): Path<String>) -> Reply {
    Ok(Json(find(&*enter(&world, &headers, false)?, &id)?).into_response())
}

async fn cancel(Given(world): Given<Shared>, headers: HeaderMap, Path(id): Path<String>) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let save = find(&world, &id)?;
    let at = world
        .saves
        .iter_mut()
        .find(|one| one.id == save.id)
        .unwrap();
    at.cancelling = true;
    at.version += 1;
    Ok((StatusCode::ACCEPTED, Json(at.clone())).into_response())
}

async fn hurry(Given(world): Given<Shared>, headers: HeaderMap, Path(id): Path<String>) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let save = find(&world, &id)?;
    let mut all = world.saves.iter_mut();
    let at = all.find(|one| one.id == save.id).unwrap();
    (at.hurried, at.can_hurry, at.waiting) = (true, false, None);
    at.version += 1;
    Ok((StatusCode::ACCEPTED, Json(at.clone())).into_response())
}

async fn requeue(Given(world): Given<Shared>, headers: HeaderMap, Path(id): Path<String>) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let save = find(&world, &id)?;
    world.dead.retain(|one| *one != save.id);
    let at = world
        .saves
        .iter_mut()
        .find(|one| one.id == save.id)
        .unwrap();
    (at.state, at.error, at.finished, at.attempt) = (State::Queued, None, None, at.attempt + 1);
    at.version += 1;
    Ok((StatusCode::ACCEPTED, Json(at.clone())).into_response())
}

/// The stream of a page: all open saves, what changes of them, and the list of them.
async fn events(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    drop(enter(&world, &headers, false)?);
    let (says, mut hears) = tokio::sync::mpsc::channel::<Result<Event, Infallible>>(16);
    tokio::spawn(async move {
        let mut told = HashMap::<JobId, Save>::new();
        let mut listed = (Vec::new(), std::time::Instant::now());
        while !says.is_closed() {
            let mut events = Vec::new();
            {
                let world = world.lock().unwrap();
                for save in &world.saves {
                    let before = told.get(&save.id);
                    if before == Some(save) || (before.is_none() && save.state.is_final()) {
                        continue;
                    }
                    let same = before.is_some_and(|before| before.version == save.version);
                    let name = if same { "progress" } else { "save" };
                    events.push(Event::default().event(name).json_data(save).unwrap());
                    told.insert(save.id, save.clone());
                }
                let open = world.saves.iter().filter(|save| !save.state.is_final());
                let open: Vec<_> = open.map(|save| save.id).collect();
                if open != listed.0 || listed.1.elapsed() > LIST_EVERY {
                    let list = serde_json::json!({ "saves": open });
                    events.push(Event::default().event("open").json_data(list).unwrap());
                    listed = (open, std::time::Instant::now());
                }
                if world.mute {
                    events.clear();
                }
            }
            for event in events {
                if says.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(STEP).await;
        }
    });
    let events = futures_util::stream::poll_fn(move |context| hears.poll_recv(context));
    Ok(Sse::new(events)
        .keep_alive(KeepAlive::default())
        .into_response())
}

async fn images(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Query(query): Query<HashMap<String, String>>,
) -> Reply {
    let world = enter(&world, &headers, false)?;
    let word = query.get("search").cloned().unwrap_or_default();
    let mut found: Vec<_> = world
        .images
        .iter()
        .filter(|image| {
            image.name.contains(&word)
                || image.tags.iter().any(|tag| tag.name.contains(&word))
                || crate::packages::has(&world, image, &word)
        })
        .filter(|image| {
            query
                .get("category")
                .is_none_or(|category| serde_json::to_value(image.category).unwrap() == **category)
        })
        .cloned()
        .collect();
    match query.get("sort").map(String::as_str) {
        Some("name") => found.sort_by(|a, b| a.name.cmp(&b.name)),
        Some("size") => found.sort_by_key(|image| std::cmp::Reverse(image.size)),
        _ => found.sort_by(|a, b| b.changed.cmp(&a.changed)),
    }
    let total = found.len();
    let first: usize = query
        .get("cursor")
        .map_or(0, |cursor| cursor.parse().unwrap());
    let limit: usize = query
        .get("limit")
        .map_or(50, |limit| limit.parse().unwrap());
    let images = found.into_iter().skip(first).take(limit).collect();
    Ok(Json(Images {
        images,
        total: total as u64,
        next: (first + limit < total).then(|| (first + limit).to_string()),
    })
    .into_response())
}

async fn remove(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((name, tag)): Path<(String, String)>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    for image in &mut world.images {
        if image.name == name {
            image.tags.retain(|one| one.name != tag);
        }
    }
    for save in &mut world.saves {
        if save.name == name && save.tag == tag && save.result.is_some() {
            save.image = Some(ImageFate {
                state: ImageState::Deleted,
                at: Some(ago(0)),
                save: None,
                session_name: None,
                caller: Some("sign-in:minji".to_owned()),
                renamed_to: None,
            });
        }
    }
    world.images.retain(|image| !image.tags.is_empty());
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn remove_untagged(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((name, digest)): Path<(String, String)>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let known = world.images.len();
    world
        .images
        .retain(|image| image.name != name || image.digest != digest || !image.tags.is_empty());
    if world.images.len() == known {
        return Err(refuse(refusal(
            StatusCode::NOT_FOUND,
            "not_found",
            "no image without a tag",
        )));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn change(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((name, digest)): Path<(String, String)>,
    Json(change): Json<ImageChange>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let mut all = world.images.iter_mut();
    let found = all.find(|image| image.name == name && image.digest == digest);
    let Some(image) = found else {
        return Err(refuse(refusal(
            StatusCode::NOT_FOUND,
            "not_found",
            "no image",
        )));
    };
    if let Some(text) = change.description {
        image.message = Some(text);
    }
    image.pinned = change.pinned.unwrap_or(image.pinned);
    image.shared = change.shared.unwrap_or(image.shared.clone());
    Ok(Json(image.clone()).into_response())
}

async fn shared(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let images = enter(&world, &headers, false)?.shared.clone();
    Ok(Json(Images {
        total: images.len() as u64,
        images,
        next: None,
    })
    .into_response())
}

async fn decline(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((user, name, digest)): Path<(String, String, String)>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let same = |one: &ImageView| one.user == user && one.name == name && one.digest == digest;
    world.shared.retain(|one| !same(one));
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn quota(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    Ok(Json(enter(&world, &headers, false)?.quota.clone()).into_response())
}

async fn nodes(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let nodes = enter(&world, &headers, false)?.nodes.clone();
    Ok(Json(Nodes { nodes, next: None }).into_response())
}

async fn dead(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let world = enter(&world, &headers, false)?;
    let saves = world
        .saves
        .iter()
        .filter(|save| world.dead.contains(&save.id))
        .cloned()
        .collect();
    Ok(Json(Saves { saves, next: None }).into_response())
}

async fn count(
    Given(world): Given<Shared>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let call = format!("{} {}", request.method(), request.uri());
    world.lock().unwrap().calls.push(call);
    next.run(request).await
}

fn routes(world: Shared) -> Router {
    let api = Router::new()
        .route("/me", get(me))
        .route(
            "/signin",
            get(async || Json(serde_json::json!({"token": true}))),
        )
        .route("/sessions", get(sessions))
        .route(
            "/autosave",
            get(crate::end::own)
                .put(crate::end::set)
                .delete(crate::end::clear),
        )
        .route(
            "/sessions/{id}/autosave",
            axum::routing::put(crate::autosave::set).delete(crate::autosave::clear),
        )
        .route("/sessions/{id}/timeline", get(crate::timeline::list))
        .route("/saves", get(saves).post(save))
        .route("/saves/{id}", get(check).delete(cancel))
        .route("/events", get(events))
        .route("/saves/{id}/requeue", post(requeue))
        .route("/saves/{id}/hurry", post(hurry))
        .route("/images", get(images))
        .route("/images/{name}/tags/{tag}", delete(remove))
        .route(
            "/images/{name}/digests/{digest}",
            axum::routing::patch(change)
                .delete(remove_untagged)
                .get(crate::timeline::image),
        )
        .route("/shared", get(shared))
        .route("/shared/{user}/{name}/digests/{digest}", delete(decline))
        .route("/quota", get(quota))
        .route("/nodes", get(nodes))
        .route("/{of}/{id}/packages", get(crate::packages::list))
        .route("/notify/email", axum::routing::put(crate::mail::set))
        .route("/dead", get(dead))
        .layer(axum::middleware::from_fn_with_state(world.clone(), count));
    upperdeck::service::portal::router()
        .nest("/api/v1", api)
        .with_state(world)
}

impl Standin {
    pub fn start() -> Outcome<Self> {
        let mut standin = Self {
            world: Arc::new(Mutex::new(World::new())),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            runtime: None,
        };
        standin.serve()?;
        Ok(standin)
    }

    /// Listens at the same address as before.
    pub fn serve(&mut self) -> Outcome {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind(self.address))?;
        self.address = listener.local_addr()?;
        let world = Arc::clone(&self.world);
        runtime.spawn(async move { axum::serve(listener, routes(world)).await });
        let world = Arc::clone(&self.world);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(STEP).await;
                world.lock().unwrap().step();
            }
        });
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Closes all connections and stops listening.
    pub fn go_down(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    pub fn url(&self, view: &str) -> String {
        format!("http://{}/#/{view}", self.address)
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }
}
