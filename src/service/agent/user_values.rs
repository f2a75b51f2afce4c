//! Checks what users chose for a save before it becomes arguments of the child.

use super::refusal::Refusal;
use crate::service::job::{Code, Order};

/// Maximum total size in bytes of all values that users choose. The kernel accepts 128 KiB per argument and 2 MiB in
/// all.
const MAX_USER_VALUES: usize = 96 << 10;

/// Checks the values that the user chose.
pub(super) fn check_user_values(order: &Order) -> Result<(), Refusal> {
    let options = &order.options;
    let known = options
        .compression
        .as_deref()
        .is_none_or(|codec| matches!(codec, "gzip" | "zstd"));
    if !known {
        return Err(Refusal::of(Code::Policy, "the compression is gzip or zstd"));
    }
    if options
        .labels
        .keys()
        .any(|key| key.is_empty() || key.contains('='))
    {
        return Err(Refusal::of(
            Code::Policy,
            "a label's key is not empty, and has no '=' in it",
        ));
    }
    let labels = options.labels.iter().flat_map(|(key, value)| [key, value]);
    let texts = labels
        .chain(&options.exclude)
        .chain(&options.include_volumes)
        .chain(&order.message);
    let mut bytes = 0;
    for text in texts {
        if text.contains('\0') {
            return Err(Refusal::of(
                Code::Policy,
                "message, labels and patterns have no zero bytes",
            ));
        }
        bytes += text.len();
    }
    if bytes > MAX_USER_VALUES {
        let why = format!(
            "message, labels and patterns have {bytes} bytes; {MAX_USER_VALUES} are the most"
        );
        return Err(Refusal::of(Code::Policy, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::agent::spool::tests::order;

    #[test]
    fn what_users_chose_is_checked() {
        type Change = fn(&mut Order);
        let cases: [(&str, Change, bool); 7] = [
            ("nothing", |_| {}, true),
            (
                "codec",
                |o| o.options.compression = Some("zstd".to_owned()),
                true,
            ),
            (
                "no codec",
                |o| o.options.compression = Some("none".to_owned()),
                false,
            ),
            (
                "key",
                |o| drop(o.options.labels.insert("a=b".to_owned(), String::new())),
                false,
            ),
            (
                "empty key",
                |o| drop(o.options.labels.insert(String::new(), String::new())),
                false,
            ),
            ("zero byte", |o| o.message = Some("a\0b".to_owned()), false),
            (
                "long",
                |o| o.options.exclude = vec!["x".repeat(MAX_USER_VALUES + 1)],
                false,
            ),
        ];
        for (case, change, fine) in cases {
            let mut it = order();
            change(&mut it);
            assert_eq!(check_user_values(&it).is_ok(), fine, "{case}");
        }
    }
}
