//! What a user's word means among volumes and their snapshots: an id, the start of one, or a name. Pure.

use super::volume_door::VolumeError;

/// One of those that have an id and perhaps a name.
pub(super) fn pick<T>(
    what: &'static str,
    word: &str,
    all: Vec<T>,
    (prefix, names): (&str, impl Fn(&T) -> (String, Option<String>)),
) -> Result<T, VolumeError> {
    let unknown = || VolumeError::Unknown { what, word: word.to_owned() };
    let start = format!("{prefix}{}", word.strip_prefix(prefix).unwrap_or(word));
    let (mut exact, mut starting) = (Vec::new(), Vec::new());
    for one in all {
        let (id, name) = names(&one);
        if id == word || name.as_deref() == Some(word) {
            exact.push(one);
        } else if start.len() > prefix.len() && id.starts_with(&start) {
            starting.push(one);
        }
    }
    let mut found = if exact.is_empty() { starting } else { exact };
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (Some(_), more) => Err(VolumeError::Ambiguous { word: word.to_owned(), count: more + 1 }),
        (None, _) => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VolumeId;

    #[test]
    fn a_word_is_an_id_the_start_of_one_or_a_name() {
        let ids = ["vol-aaaaaaaaaaaaaaaa", "vol-abaaaaaaaaaaaaaa", "vol-zzaaaaaaaaaaaaaa"];
        let names = |one: &&str| ((*one).to_owned(), one.ends_with("zaaaaaaaaaaaaaa").then(|| "ab".to_owned()));
        let find = |word: &str| pick("volume", word, ids.to_vec(), (VolumeId::PREFIX, names));
        assert_eq!(find("vol-aa").unwrap(), ids[0]);
        assert_eq!(find("zz").unwrap(), ids[2]);
        assert_eq!(find("ab").unwrap(), ids[2], "a name is meant before the start of an id");
        assert!(matches!(find("a"), Err(VolumeError::Ambiguous { count: 2, .. })));
        for word in ["", "vol-", "q"] {
            assert!(matches!(find(word), Err(VolumeError::Unknown { .. })), "{word}");
        }
    }
}
