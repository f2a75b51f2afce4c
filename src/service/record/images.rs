//! What the record knows of images after their saves: what became of them, and what users say about them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::{AnyConnection, Row as _};

use super::{Error, Record, Save, id_of, places, view};
use crate::service::job::{JobId, now_ms};

/// Maximum number of IDs or destinations per query.
const BATCH: usize = 200;
/// Maximum number of images of a user about which something is recorded.
const MAX_NOTES: i64 = 20_000;

/// What became of the image that a save made.
#[derive(Clone, Debug, PartialEq)]
pub enum Fate {
    /// A later save has taken its tag.
    Replaced(Box<Save>),
    /// It, or its tag, was deleted.
    Deleted {
        /// When that was done or seen: milliseconds since the epoch, UTC.
        at_ms: i64,
        /// The caller that did it; empty if it was done elsewhere.
        by: String,
        /// The tag that the image has instead, if it was renamed.
        renamed_to: Option<String>,
    },
}

/// An image of a user.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey {
    /// The owner.
    pub user: String,
    /// Name of the image.
    pub name: String,
    /// Digest of the manifest.
    pub digest: String,
}

impl ImageKey {
    /// Returns the key of the image of `user` with this name and digest.
    pub fn new(user: &str, name: &str, digest: impl Into<String>) -> Self {
        Self {
            user: user.to_owned(),
            name: name.to_owned(),
            digest: digest.into(),
        }
    }
}

/// What a user says about an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// Description, in place of the message of its save.
    pub description: Option<String>,
    /// Whether it may neither be deleted nor replaced.
    pub pinned: bool,
    /// Users with whom it is shared.
    pub shared: Vec<String>,
    /// Groups with whose members it is shared.
    pub groups: Vec<String>,
}

/// A change of what a user says about an image. What is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoteChange {
    /// Description; an empty one is removed.
    pub description: Option<String>,
    /// Whether the image may neither be deleted nor replaced.
    pub pinned: Option<bool>,
    /// All users with whom it is shared.
    pub shared: Option<Vec<String>>,
    /// All groups with whose members it is shared.
    pub groups: Option<Vec<String>>,
}

/// Returns what is said about one image.
async fn note(connection: &mut AnyConnection, key: &ImageKey) -> Result<Note, Error> {
    let row = sqlx::query(
        "SELECT description, pinned FROM image_notes WHERE user_name = $1 AND name = $2 AND digest = $3",
    )
    .bind(&key.user)
    .bind(&key.name)
    .bind(&key.digest)
    .fetch_optional(&mut *connection)
    .await?;
    let mut found = Note::default();
    if let Some(row) = row {
        let description: String = row.try_get("description")?;
        found.description = Some(description).filter(|text| !text.is_empty());
        found.pinned = row.try_get::<i64, _>("pinned")? != 0;
    }
    let with = [
        ("image_shares", "grantee", &mut found.shared),
        ("image_group_shares", "group_name", &mut found.groups),
    ];
    for (table, column, names) in with {
        let rows = sqlx::query(&format!(
            "SELECT {column} FROM {table} WHERE user_name = $1 AND name = $2 AND digest = $3 ORDER BY {column}"
        ))
        .bind(&key.user)
        .bind(&key.name)
        .bind(&key.digest)
        .fetch_all(&mut *connection)
        .await?;
        for row in &rows {
            names.push(row.try_get(0)?);
        }
    }
    Ok(found)
}

impl Record {
    /// Returns what became of the images of those of `saves` that have lost their tag.
    pub async fn fates(&self, saves: &[Save]) -> Result<HashMap<JobId, Fate>, Error> {
        let mut fates = HashMap::new();
        let done: Vec<&Save> = saves.iter().filter(|save| save.result.is_some()).collect();
        for part in done.chunks(BATCH) {
            self.replaced(part, &mut fates).await?;
            self.deleted(part, &mut fates).await?;
        }
        Ok(fates)
    }

    async fn replaced(
        &self,
        saves: &[&Save],
        fates: &mut HashMap<JobId, Fate>,
    ) -> Result<(), Error> {
        // The order in which they ended: an older save that was queued again took the tag after a newer one.
        let text = format!(
            "SELECT own.id AS own_id, next.id AS id, next.body AS body, next.progress AS progress
             FROM saves AS own JOIN saves AS next ON next.id = (
                 SELECT later.id FROM saves AS later
                 WHERE later.destination = own.destination AND later.state = 'succeeded'
                 AND (later.changed_ms > own.changed_ms OR (later.changed_ms = own.changed_ms AND later.id > own.id))
                 ORDER BY later.changed_ms, later.id LIMIT 1)
             WHERE own.id IN ({})",
            places(1, saves.len())
        );
        let mut query = sqlx::query(&text);
        for save in saves {
            query = query.bind(save.id.to_string());
        }
        let digest_of = |save: &Save| save.result.as_ref().map(|saved| saved.digest.clone());
        for row in query.fetch_all(&self.pool).await? {
            let of = id_of(&row.try_get::<String, _>("own_id")?)?;
            let next = view::save_of(&row)?;
            let own = saves.iter().find(|save| save.id == of);
            // A save in which nothing had changed made the same image.
            if own.is_some_and(|own| digest_of(own) != digest_of(&next)) {
                fates.insert(of, Fate::Replaced(Box::new(next)));
            }
        }
        Ok(())
    }

    async fn deleted(
        &self,
        saves: &[&Save],
        fates: &mut HashMap<JobId, Fate>,
    ) -> Result<(), Error> {
        let text = format!(
            "SELECT destination, digest, at_ms, by_name, renamed_to FROM removed WHERE destination IN ({})",
            places(1, saves.len())
        );
        let mut query = sqlx::query(&text);
        for save in saves {
            query = query.bind(&save.destination);
        }
        for row in query.fetch_all(&self.pool).await? {
            let destination: String = row.try_get("destination")?;
            let digest: String = row.try_get("digest")?;
            let at_ms: i64 = row.try_get("at_ms")?;
            let by: String = row.try_get("by_name")?;
            let renamed_to: String = row.try_get("renamed_to")?;
            let same = saves.iter().filter(|save| {
                let made = save.result.as_ref().map(|saved| saved.digest.as_str());
                save.destination == destination
                    && made == Some(digest.as_str())
                    && save.finished_ms.unwrap_or(0) <= at_ms
            });
            for save in same {
                let fate = Fate::Deleted {
                    at_ms,
                    by: by.clone(),
                    renamed_to: Some(renamed_to.clone()).filter(|tag| !tag.is_empty()),
                };
                fates.insert(save.id, fate);
            }
        }
        Ok(())
    }

    /// Returns the save that wrote the image with this digest to `destination`, the latest one if there are several.
    pub async fn saved_as(&self, destination: &str, digest: &str) -> Result<Option<Save>, Error> {
        let saves = self.saved_to(destination).await?;
        let made = |save: &Save| {
            let saved = save.result.as_ref();
            saved.is_some_and(|saved| saved.digest == digest)
        };
        Ok(saves.into_iter().find(made))
    }

    /// Returns the last save that wrote an image to `destination`.
    pub async fn last_saved_to(&self, destination: &str) -> Result<Option<Save>, Error> {
        Ok(self.saved_to(destination).await?.into_iter().next())
    }

    async fn saved_to(&self, destination: &str) -> Result<Vec<Save>, Error> {
        let rows = sqlx::query(
            "SELECT id, body, progress FROM saves WHERE destination = $1 AND state = 'succeeded'
             ORDER BY changed_ms DESC, id DESC LIMIT 50",
        )
        .bind(destination)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(view::save_of).collect()
    }

    /// Records that the tag at `destination` does not name the image with this digest any more. `by` is the caller who
    /// deleted it; empty if that was done elsewhere.
    pub async fn removed(
        &self,
        user: &str,
        destination: &str,
        digest: &str,
        by: &str,
    ) -> Result<(), Error> {
        self.tag_lost(user, destination, digest, by, "").await
    }

    /// Records that an image has lost the tag at `destination`, and has the tag `to` instead. `by` is the caller who
    /// renamed it.
    pub async fn renamed(
        &self,
        key: &ImageKey,
        destination: &str,
        to: &str,
        by: &str,
    ) -> Result<(), Error> {
        self.tag_lost(&key.user, destination, &key.digest, by, to)
            .await
    }

    async fn tag_lost(
        &self,
        user: &str,
        destination: &str,
        digest: &str,
        by: &str,
        renamed_to: &str,
    ) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO removed (destination, digest, user_name, at_ms, by_name, renamed_to)
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (destination, digest) DO UPDATE SET
             at_ms = excluded.at_ms, by_name = excluded.by_name, renamed_to = excluded.renamed_to",
        )
        .bind(destination)
        .bind(digest)
        .bind(user)
        .bind(now_ms())
        .bind(by)
        .bind(renamed_to)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Records that the tag at `destination` names the image with this digest again.
    pub async fn restored(&self, destination: &str, digest: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM removed WHERE destination = $1 AND digest = $2")
            .bind(destination)
            .bind(digest)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Returns what is said about one image.
    pub async fn note(&self, key: &ImageKey) -> Result<Note, Error> {
        let mut connection = self.pool.acquire().await?;
        note(&mut connection, key).await
    }

    /// Returns what users say about the images of `user`, or of all users.
    pub async fn notes(&self, user: Option<&str>) -> Result<BTreeMap<ImageKey, Note>, Error> {
        let read = async |columns: &str| {
            let text = format!(
                "SELECT user_name, name, digest, {columns} WHERE ($1 = '' OR user_name = $1) ORDER BY 4 LIMIT $2"
            );
            sqlx::query(&text)
                .bind(user.unwrap_or_default())
                .bind(MAX_NOTES)
                .fetch_all(&self.pool)
                .await
        };
        let mut notes = BTreeMap::<ImageKey, Note>::new();
        for row in &read("description, pinned FROM image_notes").await? {
            let description: String = row.try_get("description")?;
            let note = notes.entry(key_of(row)?).or_default();
            note.description = Some(description).filter(|text| !text.is_empty());
            note.pinned = row.try_get::<i64, _>("pinned")? != 0;
        }
        for row in &read("grantee FROM image_shares").await? {
            let note = notes.entry(key_of(row)?).or_default();
            note.shared.push(row.try_get("grantee")?);
        }
        for row in &read("group_name FROM image_group_shares").await? {
            let note = notes.entry(key_of(row)?).or_default();
            note.groups.push(row.try_get("group_name")?);
        }
        Ok(notes)
    }

    /// Returns whether an image is pinned.
    pub async fn is_pinned(&self, key: &ImageKey) -> Result<bool, Error> {
        let row = sqlx::query(
            "SELECT pinned FROM image_notes WHERE user_name = $1 AND name = $2 AND digest = $3",
        )
        .bind(&key.user)
        .bind(&key.name)
        .bind(&key.digest)
        .fetch_optional(&self.pool)
        .await?;
        match row {
            Some(row) => Ok(row.try_get::<i64, _>("pinned")? != 0),
            None => Ok(false),
        }
    }

    /// Changes what is said about an image: only what `change` has, so that changes at the same time keep each other's.
    /// Returns what is said then. With `expected`, changes nothing and returns `None` if it is not what is said before.
    pub async fn change_note(
        &self,
        key: &ImageKey,
        change: &NoteChange,
        expected: Option<&Note>,
    ) -> Result<Option<Note>, Error> {
        let mut work = self.begin().await?;
        // Also takes the lock of the row, so that two changes follow each other.
        sqlx::query(
            "INSERT INTO image_notes (user_name, name, digest, description, pinned, changed_ms)
             VALUES ($1, $2, $3, '', 0, $4)
             ON CONFLICT (user_name, name, digest) DO UPDATE SET changed_ms = excluded.changed_ms",
        )
        .bind(&key.user)
        .bind(&key.name)
        .bind(&key.digest)
        .bind(now_ms())
        .execute(&mut *work)
        .await?;
        if let Some(expected) = expected
            && note(&mut work, key).await? != *expected
        {
            work.rollback().await?;
            return Ok(None);
        }
        let of = "WHERE user_name = $1 AND name = $2 AND digest = $3";
        if let Some(description) = &change.description {
            sqlx::query(&format!("UPDATE image_notes SET description = $4 {of}"))
                .bind(&key.user)
                .bind(&key.name)
                .bind(&key.digest)
                .bind(description)
                .execute(&mut *work)
                .await?;
        }
        if let Some(pinned) = change.pinned {
            sqlx::query(&format!("UPDATE image_notes SET pinned = $4 {of}"))
                .bind(&key.user)
                .bind(&key.name)
                .bind(&key.digest)
                .bind(i64::from(pinned))
                .execute(&mut *work)
                .await?;
        }
        let shares = [
            ("image_shares", "grantee", &change.shared),
            ("image_group_shares", "group_name", &change.groups),
        ];
        for (table, column, with) in shares {
            let Some(with) = with else { continue };
            sqlx::query(&format!("DELETE FROM {table} {of}"))
                .bind(&key.user)
                .bind(&key.name)
                .bind(&key.digest)
                .execute(&mut *work)
                .await?;
            let text = format!(
                "INSERT INTO {table} (user_name, name, digest, {column}, created_ms)
                 VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING"
            );
            for one in with {
                sqlx::query(&text)
                    .bind(&key.user)
                    .bind(&key.name)
                    .bind(&key.digest)
                    .bind(one)
                    .bind(now_ms())
                    .execute(&mut *work)
                    .await?;
            }
        }
        let changed = note(&mut work, key).await?;
        work.commit().await?;
        Ok(Some(changed))
    }

    /// Forgets what is said about an image that is deleted.
    pub async fn drop_note(&self, key: &ImageKey) -> Result<(), Error> {
        for table in [
            "image_notes",
            "image_shares",
            "image_group_shares",
            "image_declined",
        ] {
            let text =
                format!("DELETE FROM {table} WHERE user_name = $1 AND name = $2 AND digest = $3");
            sqlx::query(&text)
                .bind(&key.user)
                .bind(&key.name)
                .bind(&key.digest)
                .execute(&self.pool)
                .await?;
        }
        Ok(())
    }

    /// Ends the sharing of an image with `grantee`, who does not want it: the owner can share it with that user again; as
    /// a member of a group, the user does not see it any more.
    pub async fn decline(&self, key: &ImageKey, grantee: &str) -> Result<(), Error> {
        let mut work = self.begin().await?;
        for text in [
            "DELETE FROM image_shares WHERE grantee = $1 AND user_name = $2 AND name = $3 AND digest = $4",
            "INSERT INTO image_declined (grantee, user_name, name, digest)
             SELECT DISTINCT $1, user_name, name, digest FROM image_group_shares
             WHERE user_name = $2 AND name = $3 AND digest = $4 ON CONFLICT DO NOTHING",
        ] {
            sqlx::query(text)
                .bind(grantee)
                .bind(&key.user)
                .bind(&key.name)
                .bind(&key.digest)
                .execute(&mut *work)
                .await?;
        }
        work.commit().await?;
        Ok(())
    }

    /// Returns the images of others that are shared with `user` or with one of `groups`, at most [`BATCH`] each. Of every
    /// owner the latest come first, so that one who shares very many does not crowd out the others.
    pub async fn shared_with(&self, user: &str, groups: &[String]) -> Result<Vec<ImageKey>, Error> {
        const COLUMNS: &str = "user_name, name, digest, row_number() OVER \
            (PARTITION BY user_name ORDER BY created_ms DESC, name, digest) AS place";
        const ORDER: &str = "ORDER BY place, user_name, name, digest LIMIT";
        let text = format!(
            "SELECT {COLUMNS} FROM image_shares WHERE grantee = $1 AND user_name <> $1 {ORDER} {BATCH}"
        );
        let rows = sqlx::query(&text).bind(user).fetch_all(&self.pool).await?;
        let mut found = rows
            .iter()
            .map(key_of)
            .collect::<Result<BTreeSet<_>, _>>()?;
        for part in groups.chunks(BATCH) {
            let text = format!(
                "SELECT {COLUMNS} FROM image_group_shares
                 WHERE user_name <> $1 AND group_name IN ({}) AND NOT EXISTS (
                     SELECT 1 FROM image_declined AS no WHERE no.grantee = $1 AND no.user_name = image_group_shares.user_name
                     AND no.name = image_group_shares.name AND no.digest = image_group_shares.digest)
                 {ORDER} {BATCH}",
                places(2, part.len())
            );
            let query = sqlx::query(&text).bind(user);
            let query = part.iter().fold(query, sqlx::query::Query::bind);
            for row in query.fetch_all(&self.pool).await? {
                found.insert(key_of(&row)?);
            }
        }
        Ok(found.into_iter().collect())
    }
}

fn key_of(row: &sqlx::any::AnyRow) -> Result<ImageKey, Error> {
    Ok(ImageKey {
        user: row.try_get("user_name")?,
        name: row.try_get("name")?,
        digest: row.try_get("digest")?,
    })
}
