//! Who is told about saves besides those who look: what a user needs for receiving webhooks, and the e-mails.

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, header};

use super::App;
use super::api::{Email, EmailSetting, Language, Notify, NotifySettings, SaveEvent};
use super::auth::Caller;
use super::extract::Body;
use super::refusal::Refusal;
use crate::service::record::{MailSetting, Receiver};

/// Maximum of [`EmailSetting::over_seconds`]: a week.
const MAX_OVER_S: u32 = 7 * 24 * 3600;

/// Returns where the user may have webhooks sent, and the secret that verifies them.
#[utoipa::path(
    get, path = "/api/v1/notify", tag = "saves",
    responses((status = 200, body = NotifySettings, description = "Origins, secret and events"), Refusal)
)]
pub(super) async fn notify(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<NotifySettings>, Refusal> {
    let user = caller.require_user()?;
    let settings = &app.options.webhooks;
    let secret = settings
        .secrets
        .user_text(user)
        .filter(|_| !settings.user_origins.is_empty())
        .ok_or_else(|| Refusal::not_found("users cannot name receivers here"))?;
    Ok(Json(NotifySettings {
        origins: settings
            .user_origins
            .iter()
            .map(ToString::to_string)
            .collect(),
        secret: secret.to_string(),
        events: SaveEvent::ALL.into(),
    }))
}

/// Returns the language that a request prefers.
fn preferred(asked: Option<Language>, headers: &HeaderMap) -> Language {
    let accepted = || {
        let text = headers.get(header::ACCEPT_LANGUAGE)?.to_str().ok()?;
        let primary = |tag: &str| {
            let tag = tag.split(';').next().unwrap_or_default().trim();
            Language::from_code(tag.split('-').next().unwrap_or_default())
        };
        text.split(',').find_map(primary)
    };
    asked.or_else(accepted).unwrap_or_default()
}

/// Returns the address of the caller, or why there is none.
fn own_address<'a>(app: &App, caller: &'a Caller, field: &str) -> Result<&'a str, Refusal> {
    if app.mailer.is_none() {
        return Err(Refusal::invalid(
            field,
            "the administrators of the service have set no server for e-mails",
        ));
    }
    caller.email.as_deref().ok_or_else(|| {
        Refusal::invalid(
            field,
            "the service knows no e-mail address of yours; it takes none from a request",
        )
    })
}

/// Returns the receivers of a save of `user`: those that its request names, and the user's e-mail as set for all saves.
pub(super) async fn receivers(
    app: &App,
    caller: &Caller,
    user: &str,
    asked: Option<&Notify>,
    headers: &HeaderMap,
) -> Result<Vec<Receiver>, Refusal> {
    let nothing = Notify::default();
    let wanted = asked.unwrap_or(&nothing);
    if asked.is_some() && wanted.url.is_none() && wanted.email.is_none() {
        return Err(Refusal::invalid("notify", "it names a url, email or both"));
    }
    let mut receivers = Vec::new();
    if let Some(url) = &wanted.url {
        let events = wanted.events.as_deref();
        receivers.push(app.options.webhooks.receiver(url, events)?);
    }
    match wanted.email {
        Some(true) => {
            let address = own_address(app, caller, "notify.email")?;
            let language = preferred(wanted.language, headers);
            receivers.push(Receiver::email(address, language, 0));
        }
        None if app.mailer.is_some() => {
            if let Some(set) = app.record.mail_setting(user).await? {
                // A caller who is the user says where that user is reached today.
                let own = caller.email.clone();
                let own = own.filter(|_| caller.user.as_deref() == Some(user));
                let address = own.unwrap_or(set.address);
                receivers.push(Receiver::email(address, set.language, set.over_s));
            }
        }
        Some(false) | None => {}
    }
    Ok(receivers)
}

/// Returns where the caller gets e-mails and about which saves; `None` if there are no e-mails or the address is unknown.
pub(super) async fn email(app: &App, caller: &Caller) -> Result<Option<Email>, Refusal> {
    let (Some(_), Some(address), Some(user)) = (&app.mailer, &caller.email, &caller.user) else {
        return Ok(None);
    };
    let set = app.record.mail_setting(user).await?;
    Ok(Some(Email {
        address: address.clone(),
        over_seconds: set.map(|set| set.over_s),
    }))
}

/// Sets which of all saves the caller gets an e-mail about when they end.
///
/// It goes to the address that the service knows of the caller, which is kept for saves that others request for this user:
/// portals, API tokens.
#[utoipa::path(
    put, path = "/api/v1/notify/email", tag = "saves",
    request_body = EmailSetting,
    responses((status = 200, body = Email, description = "As it is now"), Refusal)
)]
pub(super) async fn set_email(
    Extracted(app): Extracted<App>,
    caller: Caller,
    headers: HeaderMap,
    Body(asked): Body<EmailSetting>,
) -> Result<Json<Email>, Refusal> {
    let user = caller.require_user()?;
    if asked.over_seconds.is_some_and(|over| over > MAX_OVER_S) {
        return Err(Refusal::invalid(
            "over_seconds",
            format!("it is at most {MAX_OVER_S}"),
        ));
    }
    // Without an address, e-mails can still be ended.
    let Some(over_s) = asked.over_seconds else {
        app.record.set_mail(user, None).await?;
        let address = own_address(&app, &caller, "over_seconds").unwrap_or_default();
        return Ok(Json(Email {
            address: address.to_owned(),
            over_seconds: None,
        }));
    };
    let address = own_address(&app, &caller, "over_seconds")?;
    let setting = MailSetting {
        address: address.to_owned(),
        language: preferred(asked.language, &headers),
        over_s,
    };
    app.record.set_mail(user, Some(&setting)).await?;
    Ok(Json(Email {
        address: setting.address,
        over_seconds: Some(over_s),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_is_the_first_that_there_is() {
        let of = |asked, text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_LANGUAGE, text.parse().unwrap());
            preferred(asked, &headers)
        };
        assert_eq!(of(None, "de, ko-KR;q=0.8, en;q=0.5"), Language::Ko);
        assert_eq!(of(None, "de"), Language::En);
        assert_eq!(of(None, ""), Language::En);
        assert_eq!(of(Some(Language::En), "ko"), Language::En);
        assert_eq!(preferred(None, &HeaderMap::new()), Language::En);
    }
}
