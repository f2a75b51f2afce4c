//! Lists and deletes content of a registry, using only the distribution API.
//!
//! Format: distribution's HTTP API V2 ("Listing Repositories", which the OCI specification omits); distribution-spec
//! "Content Discovery" and "Content Management".

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LINK};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Url;
use serde::Deserialize;

use super::error::{Error, Request, Step};
use super::host::{Call, Scopes};
use super::{Reference, Registries, Repository, header_text};
use crate::common::digest::Digest;
use crate::common::reference;
use crate::image::manifest::raw::MANIFEST_TYPES;

/// Number of names requested per page. Registries may return fewer.
const PAGE: usize = 1000;
/// Upper bound on the number of names; a longer list is treated as endless.
const MAX_NAMES: usize = 200_000;
/// Maximum number of pages of a list: pages can be empty, and each can name a next one.
const MAX_PAGES: usize = 2_000;
/// The longest name of a repository or a tag, in bytes.
const MAX_NAME: usize = 255;
const MAX_PAGE_BYTES: u64 = 16 << 20;

/// The manifest that a tag refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestHead {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest, as the registry returned it.
    pub media_type: Option<String>,
    /// Size of the manifest in bytes.
    pub size: Option<u64>,
}

#[derive(Deserialize)]
struct NameList {
    repositories: Option<Vec<String>>,
    tags: Option<Vec<String>>,
}

impl Registries {
    /// Lists all repositories of a host that are visible with the configured credentials. Names that violate the
    /// grammar are left out.
    pub async fn catalog(&self, host: &str) -> Result<Vec<String>, Error> {
        let reference: Reference = format!("{host}/x").parse()?;
        let mut repository = self.pull_from(&reference)?;
        repository.name.clear();
        let scopes = Scopes {
            repository: String::new(),
            scopes: vec!["registry:catalog:*".to_owned()],
        };
        let url = repository
            .host
            .url(&format!("/v2/_catalog?n={PAGE}"))
            .await?;
        let names = repository
            .names(url, &scopes, |page| page.repositories)
            .await?;
        Ok(names
            .unwrap_or_default()
            .into_iter()
            .filter(|name| reference::check_repository(name).is_ok())
            .collect())
    }

    /// Opens the repository of `reference` for deletion.
    pub(crate) fn delete_from(&self, reference: &Reference) -> Result<Repository, Error> {
        self.open(reference, "pull,delete")
    }
}

impl Repository {
    /// Lists all tags. Returns `None` if the repository does not exist.
    pub async fn tags(&self) -> Result<Option<Vec<String>>, Error> {
        let url = self.url(&format!("tags/list?n={PAGE}")).await?;
        let call = self.call(Step::List, Method::GET, url);
        let names = self.names(call.url, &call.scopes, |page| page.tags).await?;
        Ok(names.map(|tags| {
            tags.into_iter()
                .filter(|tag| reference::check_tag(tag).is_ok())
                .collect()
        }))
    }

    async fn names(
        &self,
        mut url: Url,
        scopes: &Scopes,
        pick: impl Fn(NameList) -> Option<Vec<String>>,
    ) -> Result<Option<Vec<String>>, Error> {
        let mut found = Vec::new();
        let mut pages = 0;
        loop {
            let mut call = Call {
                scopes: scopes.clone(),
                ..self.call(Step::List, Method::GET, url)
            };
            call.accept = &[404];
            let response = self.host.call(&call).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok((!found.is_empty()).then_some(found));
            }
            let request = Request::new(&call.method, &call.url);
            let next = next_page(response.headers());
            let body = self
                .host
                .read_body(&request, "a list", response, MAX_PAGE_BYTES)
                .await?;
            let page: NameList =
                serde_json::from_slice(&body).map_err(|_| Error::InvalidDocument {
                    request: request.clone(),
                    reason: "expected a list of names".to_owned(),
                })?;
            let names = pick(page).unwrap_or_default().into_iter();
            found.extend(names.filter(|name| name.len() <= MAX_NAME));
            let Some(next) = next.and_then(|next| call.url.join(&next).ok()) else {
                return Ok(Some(found));
            };
            // As with `Location`, only path and query are used; the host is ignored.
            let mut here = call.url.clone();
            here.set_path(next.path());
            here.set_query(next.query());
            pages += 1;
            if here == call.url || found.len() > MAX_NAMES || pages == MAX_PAGES {
                return Err(Error::ProtocolViolation {
                    request,
                    reason: "a list that does not end".to_owned(),
                });
            }
            url = here;
        }
    }

    /// Returns the manifest that a tag or digest refers to, or `None` if there is none.
    pub async fn head_manifest(&self, tag_or_digest: &str) -> Result<Option<ManifestHead>, Error> {
        let url = self.url(&format!("manifests/{tag_or_digest}")).await?;
        let mut call = self.call(Step::ReadManifest, Method::HEAD, url);
        for media_type in MANIFEST_TYPES {
            call.headers
                .append(ACCEPT, HeaderValue::from_static(media_type));
        }
        call.accept = &[404];
        let response = self.host.call(&call).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let headers = response.headers();
        let said = headers
            .get("docker-content-digest")
            .and_then(|v| v.to_str().ok()?.parse().ok());
        let digest = match said {
            Some(digest) => digest,
            // The digest header is optional; if it is missing, the manifest is read and hashed.
            None => self.manifest(tag_or_digest).await?.digest,
        };
        Ok(Some(ManifestHead {
            digest,
            media_type: header_text(headers, &CONTENT_TYPE),
            size: header_text(headers, &CONTENT_LENGTH).and_then(|n| n.parse().ok()),
        }))
    }

    /// Deletes a manifest by its digest, or a tag where the registry supports that. Returns false if it did not exist.
    ///
    /// Distribution 2.8 accepts digests only and answers 400 or 405 for a tag, and 405 for everything if deletion is
    /// disabled.
    pub async fn delete_manifest(&self, tag_or_digest: &str) -> Result<bool, Error> {
        let url = self.url(&format!("manifests/{tag_or_digest}")).await?;
        let mut call = self.call(Step::Delete, Method::DELETE, url);
        call.accept = &[404];
        let mut failed = 0;
        let response = self.host.call_after(&call, &mut failed).await?;
        // After a failed attempt, a 404 may mean that the earlier request succeeded and its answer was lost.
        Ok(response.status() != StatusCode::NOT_FOUND || failed > 0)
    }
}

/// Parses `Link: <URL>; rel="next"` (RFC 8288).
fn next_page(headers: &HeaderMap) -> Option<String> {
    let link = headers.get(LINK)?.to_str().ok()?;
    link.split(',').find_map(|part| {
        let (target, parameters) = part.trim().strip_prefix('<')?.split_once('>')?;
        let next = parameters
            .split(';')
            .any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next"));
        next.then(|| target.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_the_one_called_so() {
        for (link, expected) in [
            (
                r#"</v2/_catalog?last=b&n=2>; rel="next""#,
                Some("/v2/_catalog?last=b&n=2"),
            ),
            (
                r#"</p?page=1>; rel="prev" , </p?page=3>; rel="next""#,
                Some("/p?page=3"),
            ),
            (r#"</p?page=1>; rel="prev""#, None),
            ("nonsense", None),
            ("", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(LINK, HeaderValue::from_static(link));
            assert_eq!(next_page(&headers).as_deref(), expected, "{link}");
        }
        assert_eq!(next_page(&HeaderMap::new()), None);
    }
}
