//! The text of an e-mail about the end of a save. What tenants wrote stands in it escaped and shortened, each on a line of
//! its own.

use std::fmt::Write as _;

use crate::common::{escape, message};
use crate::service::record::{Language, Notice, Save, SaveEvent};

/// Maximum number of characters of one value.
const MAX_VALUE: usize = 500;

/// The words of one language.
struct Words {
    succeeded: [&'static str; 2],
    failed: [&'static str; 2],
    cancelled: [&'static str; 2],
    image: &'static str,
    size: &'static str,
    took: &'static str,
    description: &'static str,
    remarks: &'static str,
    reason: &'static str,
    save: &'static str,
    page: &'static str,
    why: &'static str,
}

/// Of each pair, the first is in the subject, before the name, and the second in the text, before the session.
const ENGLISH: Words = Words {
    succeeded: ["Saved", "The session was saved"],
    failed: ["Not saved", "The session was not saved"],
    cancelled: ["Cancelled", "The save of the session was cancelled"],
    image: "Image",
    size: "Size",
    took: "Took",
    description: "Description",
    remarks: "Remarks, see the page",
    reason: "Reason",
    save: "Save",
    page: "Page",
    why: "You get this e-mail because you asked for it when you saved, or for all your saves. The page is where you change \
          that.",
};

const KOREAN: Words = Words {
    succeeded: ["저장됨", "세션을 저장했습니다"],
    failed: ["저장 실패", "세션을 저장하지 못했습니다"],
    cancelled: ["취소됨", "세션 저장이 취소되었습니다"],
    image: "이미지",
    size: "크기",
    took: "걸린 시간",
    description: "설명",
    remarks: "참고 사항(페이지에서 확인)",
    reason: "서버의 원래 메시지",
    save: "저장 번호",
    page: "페이지",
    why: "저장할 때 요청했거나 모든 저장에 대해 이메일을 받도록 설정했기 때문에 보내 드리는 메일입니다. 설정은 페이지에서 바꿀 수 있습니다.",
};

fn words(language: Language) -> &'static Words {
    match language {
        Language::En => &ENGLISH,
        Language::Ko => &KOREAN,
    }
}

fn outcome(event: SaveEvent, words: &Words) -> [&'static str; 2] {
    match event {
        SaveEvent::Succeeded => words.succeeded,
        SaveEvent::Cancelled => words.cancelled,
        SaveEvent::Failed | SaveEvent::Queued | SaveEvent::Started => words.failed,
    }
}

fn value(text: &str) -> String {
    escape::limited(text, MAX_VALUE)
}

/// Returns the subject: the outcome, and name and tag of the image.
pub(super) fn subject(notice: &Notice, language: Language) -> String {
    let save = &notice.save;
    let [outcome, _] = outcome(notice.event, words(language));
    format!("{outcome}: {}:{}", value(&save.name), value(&save.tag))
}

/// Returns seconds as hours, minutes and seconds, which reads the same in every language: `0:00:41`.
fn clock(seconds: f64) -> String {
    let all = seconds.max(0.0).round() as u64;
    format!("{}:{:02}:{:02}", all / 3600, all / 60 % 60, all % 60)
}

fn facts(save: &Save, words: &Words) -> Vec<(&'static str, String)> {
    let mut facts = vec![(words.image, value(&save.destination))];
    if let Some(result) = &save.result {
        facts.push((words.size, message::size(result.image_bytes)));
        facts.push((words.took, clock(result.seconds)));
    }
    if let Some(text) = &save.message {
        facts.push((words.description, value(text)));
    }
    if let Some(failure) = &save.error {
        let reason = format!("{} ({})", value(&failure.message), failure.code.name());
        facts.push((words.reason, reason));
    }
    if !save.warnings.is_empty() {
        facts.push((words.remarks, save.warnings.len().to_string()));
    }
    facts.push((words.save, save.id.to_string()));
    facts
}

/// Returns the text. `page` is the address of the page without a slash at its end.
pub(super) fn body(notice: &Notice, language: Language, page: Option<&str>) -> String {
    let (words, save) = (words(language), &notice.save);
    let [_, outcome] = outcome(notice.event, words);
    let mut text = format!("{outcome}: {}\n\n", value(&save.session_name));
    for (name, value) in facts(save, words) {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{name}: {value}");
    }
    if let Some(page) = page {
        let view = match notice.event {
            SaveEvent::Succeeded => "images",
            _ => "history",
        };
        let _ = write!(text, "\n{}: {page}/#/{view}\n", words.page);
    }
    let _ = write!(text, "\n{}\n", words.why);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_at_once() {
        for (seconds, text) in [(0.4, "0:00:00"), (41.2, "0:00:41"), (3_725.0, "1:02:05")] {
            assert_eq!(clock(seconds), text);
        }
    }
}
