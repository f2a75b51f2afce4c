//! The packages by which the images of saves differ from their bases, as the agents reported them.

use std::collections::HashSet;

use sqlx::{Any, Row as _, Transaction};

use super::{Error, Record, id_of, read, written};
use crate::image::packages::{Manager, Packages};
use crate::service::job::JobId;

/// Maximum number of packages per save, and of bytes in all their texts, whatever the agent sent.
const MAX_PACKAGES: usize = 2000;
const MAX_BYTES: usize = 512 << 10;
/// Number of rows per statement.
const BATCH: usize = 100;
/// Maximum number of saves that a search returns.
const MAX_FOUND: i64 = 5000;

/// Stores the list of a save in place of an earlier one.
pub(super) async fn keep(
    work: &mut Transaction<'static, Any>,
    save: JobId,
    packages: &Packages,
) -> Result<(), Error> {
    let packages = packages.clone().sanitised(MAX_PACKAGES, MAX_BYTES);
    let id = save.to_string();
    for table in ["packages", "package_lists"] {
        let text = format!("DELETE FROM {table} WHERE save = $1");
        sqlx::query(&text).bind(&id).execute(&mut **work).await?;
    }
    sqlx::query("INSERT INTO package_lists (save, body) VALUES ($1, $2)")
        .bind(&id)
        .bind(written(save, &packages)?)
        .execute(&mut **work)
        .await?;
    let there = packages.packages.iter().zip(0_i64..);
    let there: Vec<_> = there
        .filter_map(|(package, place)| {
            let name = package.manager.normal_name(&package.name);
            Some((place, name, package.version.clone()?))
        })
        .collect();
    for part in there.chunks(BATCH) {
        let row = |n: usize| {
            let first = 4 * n + 1;
            format!("(${first}, ${}, ${}, ${})", first + 1, first + 2, first + 3)
        };
        let rows: Vec<String> = (0..part.len()).map(row).collect();
        let text = format!(
            "INSERT INTO packages (save, place, name, version) VALUES {}",
            rows.join(", ")
        );
        let mut query = sqlx::query(&text);
        for (place, name, version) in part {
            query = query.bind(&id).bind(place).bind(name).bind(version);
        }
        query.execute(&mut **work).await?;
    }
    Ok(())
}

impl Record {
    /// Returns the packages by which the image of a save differs from its base; `None` if its agent did not report them.
    pub async fn packages(&self, save: JobId) -> Result<Option<Packages>, Error> {
        let id = save.to_string();
        let row = sqlx::query("SELECT body FROM package_lists WHERE save = $1")
            .bind(&id)
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| read(&id, &row.try_get::<String, _>("body")?))
            .transpose()
    }

    /// Returns the saves of a user, or of all users, whose images have a package that their bases do not have, or have in
    /// another version. Names are compared as [`Manager::normal_name`] writes them; without `version` any counts.
    pub async fn saves_with_package(
        &self,
        user: Option<&str>,
        name: &str,
        version: Option<&str>,
    ) -> Result<HashSet<JobId>, Error> {
        let rows = sqlx::query(
            "SELECT DISTINCT packages.save AS id FROM packages JOIN saves ON saves.id = packages.save
             WHERE packages.name IN ($1, $2) AND ($3 = '' OR packages.version = $3)
             AND ($4 = '' OR saves.user_name = $4) ORDER BY packages.save DESC LIMIT $5",
        )
        .bind(Manager::Dpkg.normal_name(name))
        .bind(Manager::Pip.normal_name(name))
        .bind(version.unwrap_or_default())
        .bind(user.unwrap_or_default())
        .bind(MAX_FOUND)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| id_of(&row.try_get::<String, _>("id")?))
            .collect()
    }
}
