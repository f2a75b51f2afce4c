//! The tables and their migration. The SQL is valid for both SQLite and PostgreSQL: INT8, TEXT, partial indexes.

use sqlx::{AnyPool, Row as _};

use super::Error;

/// The statements that migrate the schema from one version to the next. Released entries must never be changed.
const VERSIONS: [&[&str]; 11] = [
    FIRST, SIGN_INS, IMAGES, NOTICES, SESSIONS, PROVIDER, PACKAGES, MAIL, CALLERS, DECLINED,
    AUTOSAVES,
];

const FIRST: &[&str] = &[
    // Columns that queries use, and the whole save as JSON in `body`. Progress changes without a new version.
    "CREATE TABLE saves (
        id TEXT PRIMARY KEY,
        session TEXT NOT NULL,
        user_name TEXT NOT NULL,
        destination TEXT NOT NULL,
        node TEXT NOT NULL,
        state TEXT NOT NULL,
        version INT8 NOT NULL,
        cancelling INT8 NOT NULL,
        queued_ms INT8 NOT NULL,
        changed_ms INT8 NOT NULL,
        body TEXT NOT NULL,
        progress TEXT,
        progress_fence INT8 NOT NULL,
        progress_seq INT8 NOT NULL
    )",
    "CREATE UNIQUE INDEX saves_one_open_a_session ON saves (session)
        WHERE state IN ('queued', 'assigned', 'running')",
    "CREATE UNIQUE INDEX saves_one_open_a_tag ON saves (destination)
        WHERE state IN ('queued', 'assigned', 'running')",
    "CREATE INDEX saves_by_user ON saves (user_name, id)",
    "CREATE INDEX saves_by_state ON saves (state, id)",
    // Every version of a save, for watchers. Deleted some time after the save has ended.
    "CREATE TABLE changes (
        save TEXT NOT NULL,
        version INT8 NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (save, version)
    )",
    // Every transition. Rows are never updated.
    "CREATE TABLE audit (
        save TEXT NOT NULL,
        version INT8 NOT NULL,
        step INT8 NOT NULL,
        at_ms INT8 NOT NULL,
        from_state TEXT NOT NULL,
        to_state TEXT NOT NULL,
        attempt INT8 NOT NULL,
        fence INT8 NOT NULL,
        actor TEXT NOT NULL,
        detail TEXT NOT NULL,
        PRIMARY KEY (save, version, step)
    )",
    // Requests to the queue, written in the transaction of the change that they result from. A manager that takes one
    // holds it for a limited time.
    "CREATE TABLE outbox (
        save TEXT NOT NULL,
        errand TEXT NOT NULL,
        due_ms INT8 NOT NULL,
        taken_ms INT8 NOT NULL,
        taken_by TEXT NOT NULL,
        PRIMARY KEY (save, errand)
    )",
    "CREATE INDEX outbox_by_due ON outbox (due_ms)",
    // Reports that have been applied.
    "CREATE TABLE reports (
        save TEXT NOT NULL,
        fence INT8 NOT NULL,
        seq INT8 NOT NULL,
        PRIMARY KEY (save, fence, seq)
    )",
    "CREATE TABLE idempotency (
        caller TEXT NOT NULL,
        request_key TEXT NOT NULL,
        request_hash TEXT NOT NULL,
        save TEXT NOT NULL,
        created_ms INT8 NOT NULL,
        PRIMARY KEY (caller, request_key)
    )",
];

const SIGN_INS: &[&str] = &[
    // Sign-ins of browsers; `cookie` and `page` are digests of the values that the browser holds.
    "CREATE TABLE signins (
        cookie TEXT PRIMARY KEY,
        page TEXT NOT NULL,
        caller TEXT NOT NULL,
        basis TEXT NOT NULL,
        user_name TEXT NOT NULL,
        administrator INT8 NOT NULL,
        created_ms INT8 NOT NULL,
        expires_ms INT8 NOT NULL
    )",
    "CREATE INDEX signins_by_caller ON signins (caller, created_ms)",
    "CREATE INDEX signins_by_end ON signins (expires_ms)",
];

const IMAGES: &[&str] = &[
    "CREATE INDEX saves_by_destination ON saves (destination, id)",
    // Tags that do not name an image any more, for the history.
    "CREATE TABLE removed (
        destination TEXT NOT NULL,
        digest TEXT NOT NULL,
        user_name TEXT NOT NULL,
        at_ms INT8 NOT NULL,
        by_name TEXT NOT NULL,
        PRIMARY KEY (destination, digest)
    )",
    // What users say about their images.
    "CREATE TABLE image_notes (
        user_name TEXT NOT NULL,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        description TEXT NOT NULL,
        pinned INT8 NOT NULL,
        changed_ms INT8 NOT NULL,
        PRIMARY KEY (user_name, name, digest)
    )",
    "CREATE TABLE image_shares (
        user_name TEXT NOT NULL,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        grantee TEXT NOT NULL,
        created_ms INT8 NOT NULL,
        PRIMARY KEY (user_name, name, digest, grantee)
    )",
    "CREATE INDEX image_shares_by_grantee ON image_shares (grantee)",
];

const NOTICES: &[&str] = &[
    // What receivers outside of the service are told, written in the transaction of the change that it is about.
    "CREATE TABLE notices (
        id TEXT PRIMARY KEY,
        save TEXT NOT NULL,
        user_name TEXT NOT NULL,
        event TEXT NOT NULL,
        kind TEXT NOT NULL,
        address TEXT NOT NULL,
        site INT8 NOT NULL,
        lane TEXT NOT NULL,
        at_ms INT8 NOT NULL,
        body TEXT NOT NULL,
        tries INT8 NOT NULL,
        due_ms INT8 NOT NULL,
        taken_ms INT8 NOT NULL,
        taken_by TEXT NOT NULL
    )",
    "CREATE INDEX notices_by_due ON notices (site, due_ms)",
    "CREATE INDEX notices_by_taken ON notices (taken_ms)",
    "CREATE INDEX notices_by_user ON notices (user_name, site)",
];

const SESSIONS: &[&str] = &[
    // The sessions that managers saw last, for accepting saves while the queue does not answer.
    "CREATE TABLE sessions_seen (
        node TEXT PRIMARY KEY,
        seen_ms INT8 NOT NULL,
        body TEXT NOT NULL
    )",
];

const PROVIDER: &[&str] = &[
    "ALTER TABLE signins ADD COLUMN user_groups TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE signins ADD COLUMN email TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE signins ADD COLUMN hint TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE removed ADD COLUMN renamed_to TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE image_group_shares (
        user_name TEXT NOT NULL,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        group_name TEXT NOT NULL,
        created_ms INT8 NOT NULL,
        PRIMARY KEY (user_name, name, digest, group_name)
    )",
    "CREATE INDEX image_group_shares_by_group ON image_group_shares (group_name)",
    // Sign-ins at an identity provider that are complete.
    "CREATE TABLE signin_flows (
        flow TEXT PRIMARY KEY,
        until_ms INT8 NOT NULL
    )",
];

const PACKAGES: &[&str] = &[
    // The packages by which the image of a save differs from its base: the list as JSON, and an index of those that the
    // image has, for searches.
    "CREATE TABLE package_lists (
        save TEXT PRIMARY KEY,
        body TEXT NOT NULL
    )",
    "CREATE TABLE packages (
        save TEXT NOT NULL,
        place INT8 NOT NULL,
        name TEXT NOT NULL,
        version TEXT NOT NULL,
        PRIMARY KEY (save, place)
    )",
    "CREATE INDEX packages_by_name ON packages (name, version)",
];

const MAIL: &[&str] = &[
    // Which ends of saves users want e-mails about.
    "CREATE TABLE mail_settings (
        user_name TEXT PRIMARY KEY,
        address TEXT NOT NULL,
        language TEXT NOT NULL,
        over_s INT8 NOT NULL
    )",
    // How many e-mails each user has had on a day.
    "CREATE TABLE mail_counts (
        user_name TEXT NOT NULL,
        day INT8 NOT NULL,
        n INT8 NOT NULL,
        PRIMARY KEY (user_name, day)
    )",
];

const CALLERS: &[&str] = &[
    // Who asked for a save, which may be another than its user. Empty for saves of earlier versions.
    "ALTER TABLE saves ADD COLUMN caller TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX saves_by_caller ON saves (caller, id)",
];

const DECLINED: &[&str] = &[
    // Images that are shared with a group, and that a member of it does not want to see.
    "CREATE TABLE image_declined (
        grantee TEXT NOT NULL,
        user_name TEXT NOT NULL,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        PRIMARY KEY (grantee, user_name, name, digest)
    )",
];

const AUTOSAVES: &[&str] = &[
    // What users want about autosaves: of sessions with a name, and with an empty name of all. 0 minutes: none; keep 0: as the
    // administrator says.
    "CREATE TABLE autosave_settings (
        user_name TEXT NOT NULL,
        session_name TEXT NOT NULL,
        every_minutes INT8 NOT NULL,
        keep INT8 NOT NULL,
        changed_ms INT8 NOT NULL,
        PRIMARY KEY (user_name, session_name)
    )",
    // Which of their sessions users want to be saved when they end, and since when.
    "CREATE TABLE end_settings (
        user_name TEXT PRIMARY KEY,
        wanted TEXT NOT NULL,
        changed_ms INT8 NOT NULL
    )",
    // Of an autosave, the number of the latest ones of its session that are kept.
    "ALTER TABLE saves ADD COLUMN keep INT8 NOT NULL DEFAULT 0",
    "CREATE INDEX saves_by_session ON saves (session, changed_ms)",
];

/// Takes an advisory lock for the migration. The number is arbitrary.
const LOCK: &str = "SELECT count(*) FROM pg_advisory_xact_lock(7236101)";

/// Migrates the tables to the current version. If several managers start at the same time, one migrates and the others
/// wait.
pub(super) async fn migrate(pool: &AnyPool, sqlite: bool) -> Result<(), Error> {
    // With IMMEDIATE, SQLite takes the write lock at the start of the transaction.
    let begin = if sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
    let mut work = pool.begin_with(begin).await?;
    if !sqlite {
        sqlx::query(LOCK).fetch_one(&mut *work).await?;
    }
    sqlx::query("CREATE TABLE IF NOT EXISTS upperdeck_schema (version INT8 NOT NULL)")
        .execute(&mut *work)
        .await?;
    let row = sqlx::query("SELECT count(*) AS n, max(version) AS version FROM upperdeck_schema")
        .fetch_one(&mut *work)
        .await?;
    let fresh = row.try_get::<i64, _>("n")? == 0;
    let found = if fresh {
        0
    } else {
        row.try_get::<i64, _>("version")?
    };
    let known = VERSIONS.len() as i64;
    if found > known {
        return Err(Error::Newer { found, known });
    }
    for statements in VERSIONS.iter().skip(found as usize) {
        for statement in *statements {
            sqlx::query(statement).execute(&mut *work).await?;
        }
    }
    if fresh {
        sqlx::query("INSERT INTO upperdeck_schema (version) VALUES ($1)")
            .bind(known)
            .execute(&mut *work)
            .await?;
    } else if found < known {
        sqlx::query("UPDATE upperdeck_schema SET version = $1")
            .bind(known)
            .execute(&mut *work)
            .await?;
    }
    work.commit().await?;
    Ok(())
}
