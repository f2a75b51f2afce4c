//! The web page for researchers: static files that are part of the program. The page uses the public REST API.
//!
//! All files except the page itself have a path that contains a digest of all files, so that browsers can cache them
//! forever and never mix two versions; over a slow connection they are transferred once. Links are relative, because a
//! proxy may serve the page under a prefix.

use std::io::Write as _;
use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    IF_NONE_MATCH, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};

/// Content security policy of the page: it may use its own scripts and styles and send requests to its own origin,
/// nothing else. Trusted Types without a policy turn every conversion of text into markup into an error.
pub(crate) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The page itself; [`File::page`] replaces `{build}` and `{preload}`.
const PAGE: &str = include_str!("index.html");
/// Name, content type and content of each file. Languages are loaded on demand, the others at once.
const FILES: [(&str, &str, &str); 20] = [
    ("style.css", CSS, include_str!("style.css")),
    ("app.js", SCRIPT, include_str!("app.js")),
    ("api.js", SCRIPT, include_str!("api.js")),
    ("element.js", SCRIPT, include_str!("element.js")),
    ("format.js", SCRIPT, include_str!("format.js")),
    ("language.js", SCRIPT, include_str!("language.js")),
    ("saves.js", SCRIPT, include_str!("saves.js")),
    ("sessions.js", SCRIPT, include_str!("sessions.js")),
    ("row.js", SCRIPT, include_str!("row.js")),
    ("contents.js", SCRIPT, include_str!("contents.js")),
    ("mail.js", SCRIPT, include_str!("mail.js")),
    ("packages.js", SCRIPT, include_str!("packages.js")),
    ("timeline.js", SCRIPT, include_str!("timeline.js")),
    ("autosave.js", SCRIPT, include_str!("autosave.js")),
    ("images.js", SCRIPT, include_str!("images.js")),
    ("history.js", SCRIPT, include_str!("history.js")),
    ("operations.js", SCRIPT, include_str!("operations.js")),
    ("signin.js", SCRIPT, include_str!("signin.js")),
    ("strings/en.js", SCRIPT, include_str!("strings/en.js")),
    ("strings/ko.js", SCRIPT, include_str!("strings/ko.js")),
];

/// A file in the forms in which it is sent.
struct File {
    name: &'static str,
    content_type: &'static str,
    plain: Vec<u8>,
    gzip: Vec<u8>,
    etag: String,
}

impl File {
    fn new(name: &'static str, content_type: &'static str, content: &str) -> Self {
        let digest = hex::encode(Sha256::digest(content));
        // Writing to memory cannot fail. If it did, the uncompressed bytes would be sent.
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        let gzip = packed
            .write_all(content.as_bytes())
            .and_then(|()| packed.finish())
            .unwrap_or_default();
        Self {
            name,
            content_type,
            plain: content.into(),
            gzip,
            etag: format!("\"{}\"", &digest[..16]),
        }
    }

    fn page(build: &str) -> Self {
        let preload: String = FILES
            .iter()
            .filter(|(name, kind, _)| *kind == SCRIPT && !name.contains('/'))
            .map(|(name, _, _)| {
                format!("<link rel=\"modulepreload\" href=\"portal/{build}/{name}\">\n")
            })
            .collect();
        let page = PAGE
            .replace("{preload}\n", &preload)
            .replace("{build}", build);
        Self::new("", HTML, &page)
    }

    /// Returns the response to a request with these headers. `cache` is the value of `Cache-Control`.
    fn answer(&self, asked: &HeaderMap, cache: &'static str) -> Response {
        let says = |name: HeaderName, word: &str| {
            asked
                .get_all(name)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .flat_map(|value| value.split(','))
                .any(|part| {
                    let (part, weight) = part.split_once(';').unwrap_or((part, ""));
                    part.trim().trim_start_matches("W/") == word && weight.trim() != "q=0"
                })
        };
        let common = [
            (CACHE_CONTROL, cache),
            (ETAG, &self.etag),
            (VARY, "Accept-Encoding"),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            (REFERRER_POLICY, "no-referrer"),
            (
                HeaderName::from_static("cross-origin-opener-policy"),
                "same-origin",
            ),
            (
                HeaderName::from_static("cross-origin-resource-policy"),
                "same-origin",
            ),
            (
                HeaderName::from_static("permissions-policy"),
                "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
            ),
        ];
        if says(IF_NONE_MATCH, &self.etag) {
            return (StatusCode::NOT_MODIFIED, common).into_response();
        }
        let content_type = [(CONTENT_TYPE, self.content_type)];
        if says(ACCEPT_ENCODING, "gzip") && !self.gzip.is_empty() {
            let packed = [(CONTENT_ENCODING, "gzip")];
            return (common, content_type, packed, self.gzip.clone()).into_response();
        }
        (common, content_type, self.plain.clone()).into_response()
    }
}

/// All files, compressed once.
struct Portal {
    build: String,
    page: File,
    files: Vec<File>,
}

static PORTAL: LazyLock<Portal> = LazyLock::new(|| {
    let mut all = Sha256::new_with_prefix(PAGE);
    for (name, _, content) in FILES {
        all.update(name);
        all.update(content);
    }
    let build = hex::encode(all.finalize())[..12].to_owned();
    let files = FILES.map(|(name, kind, content)| File::new(name, kind, content));
    Portal {
        page: File::page(&build),
        files: files.into(),
        build,
    }
});

/// Returns the routes of the page: `/`, and its files below `/portal/`. The manager adds its own routes. The query
/// `/?token=…` is evaluated by the page's scripts, which ask before they sign in with the token.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(page))
        .route("/portal/{build}/{*name}", get(file))
}

/// Serves the page. Browsers request it each time and mostly get 304; it names the build of the other files.
async fn page(asked: HeaderMap) -> Response {
    PORTAL.page.answer(&asked, "no-cache")
}

async fn file(Path((build, name)): Path<(String, String)>, asked: HeaderMap) -> Response {
    let Some(file) = PORTAL.files.iter().find(|file| file.name == name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    // While managers are being upgraded, the page of another version may request files here. These files are better
    // than none.
    let cache = if build == PORTAL.build {
        "public, max-age=31536000, immutable"
    } else {
        "no-store"
    };
    file.answer(&asked, cache)
}
