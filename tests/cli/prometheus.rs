//! Prometheus' text format (OpenMetrics 1.0), read as strictly as it is written down: every family is described before its
//! samples and only once, names and labels are well-formed, histograms add up, and the text ends with `# EOF`.

use std::collections::{BTreeMap, BTreeSet};

/// Suffixes that samples of a type may have.
fn suffixes(kind: &str) -> &'static [&'static str] {
    match kind {
        "counter" => &["_total"],
        "gauge" => &[""],
        "histogram" => &["_bucket", "_sum", "_count"],
        other => panic!("a type {other:?}"),
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|found| found.is_ascii_lowercase() || found.is_ascii_digit() || found == '_')
}

/// The labels of `{a="b",c="d"}`.
fn labels(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("labels {text:?}"));
        assert!(is_name(name), "a label's name {name:?}");
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next().unwrap_or_else(|| panic!("labels {text:?}")) {
                (_, '\\') => value.extend(characters.next().map(|(_, escaped)| escaped)),
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        assert!(found.insert(name.to_owned(), value).is_none(), "{name} twice in {text:?}");
        rest = &after[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    found
}

/// All samples by name and labels as they are written.
pub(crate) fn parse(text: &str) -> BTreeMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").expect("it ends with # EOF");
    let (mut samples, mut families) = (BTreeMap::new(), BTreeSet::new());
    let (mut family, mut kind, mut helped) = (String::new(), String::new(), false);
    for line in body.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("help has words");
            assert!(is_name(name) && words.len() > 5, "{line}");
            assert!(families.insert(name.to_owned()), "{name} is described twice");
            (family, helped) = (name.to_owned(), true);
        } else if let Some(found) = line.strip_prefix("# TYPE ") {
            let (name, found) = found.split_once(' ').expect("a type");
            assert!(helped && name == family, "{line} comes behind its help");
            kind = found.to_owned();
        } else if let Some(unit) = line.strip_prefix("# UNIT ") {
            let (name, unit) = unit.split_once(' ').expect("a unit");
            assert!(name == family && name.ends_with(unit), "{line}");
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("a sample {line:?}"));
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("a number in {line:?}"));
            let (name, rest) = series.split_once('{').unwrap_or((series, "}"));
            let inner = rest.strip_suffix('}').unwrap_or_else(|| panic!("labels of {line:?}"));
            labels(inner);
            let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            assert!(suffixes(&kind).contains(&suffix), "{line} is not of a {kind}");
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} twice");
        }
    }
    assert!(families.len() > 15, "{families:?}");
    samples
}

#[test]
fn what_is_wrong_is_found() {
    let whole = |body: &str| std::panic::catch_unwind(|| parse(&format!("{body}# EOF\n")));
    let head = "# HELP a_b words here\n# TYPE a_b gauge\n";
    for wrong in ["a_b 1\n", &format!("{head}a_c 1\n"), &format!("{head}a_b one\n"), &format!("{head}a_b{{x=1}} 1\n")] {
        assert!(whole(wrong).is_err(), "{wrong}");
    }
    assert_eq!(labels(r#"a="b,c",d="e\"f""#)["d"], "e\"f");
}
