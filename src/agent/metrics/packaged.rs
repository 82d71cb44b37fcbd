//! What `packaging/` is made of: alerts and panels may name only what the agent exposes, by the labels and words it has,
//! and there is no metric that no panel shows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use saphyr::{LoadableYamlNode, Yaml};
use serde_json::Value;

use super::{Gauges, Metrics};
use crate::agent::failure::FailureCause;
use crate::agent::health::Pressure;
use crate::agent::migration_record::MoveRecord;
use crate::agent::peers::PeerState;
use crate::agent::record::{OperationState, Timings};
use crate::agent::traffic::Passed;
use crate::agent::vm_state::{Goal, VmState};
use crate::ids::VmId;
use crate::wire::control::{FlowStatus, InterfaceStatus, VolumeStatus};

const ALERTS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/prometheus/alerts.yml"));

const DASHBOARD: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/grafana/hearth.json"));

/// Labels that Prometheus adds to whatever it reads.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

/// Words of expressions before a list of labels.
const BEFORE_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];

/// Other words of expressions that are no metrics.
const WORDS: [&str; 15] = [
    "and",
    "changes",
    "deriv",
    "histogram_quantile",
    "increase",
    "label_values",
    "max_over_time",
    "min_over_time",
    "offset",
    "or",
    "rate",
    "sum",
    "topk",
    "unless",
    "vector",
];

/// Words of labels whose words are known: a matcher must name one of them.
const CLOSED: [&str; 6] = ["goal", "result", "way", "direction", "resource", "state"];

/// Samples by name; of each the labels, and of each label the words.
type Exposed = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Metrics of an agent where everything has happened once.
fn exposed() -> Exposed {
    let metrics = Metrics::new();
    for goal in [Goal::Launch, Goal::Enlist, Goal::Migrate, Goal::Leave, Goal::Arrive, Goal::HandOver] {
        for state in [OperationState::Succeeded, OperationState::Failed, OperationState::Cancelled] {
            metrics.operation_ended(goal, state);
        }
    }
    for goal in [Goal::HandOver, Goal::Leave] {
        metrics.moved(goal, &MoveRecord { pause_us: Some(1), ..MoveRecord::default() });
    }
    metrics.operation_failed("a_code");
    metrics.effect_ended("an_effect", Duration::ZERO);
    metrics.request("/v1/vms", 200);
    metrics.refused("a_code");
    metrics.peer_refused("a_reason");
    metrics.launched(&Timings { total_us: Some(1), ..Timings::default() });
    let count = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), 1)).collect();
    let why = String::new;
    let peers = [
        PeerState::Unknown,
        PeerState::Reachable,
        PeerState::Unreachable { why: why() },
        PeerState::Refused { why: why() },
        PeerState::Conflict,
    ];
    let states = [VmState::Running, VmState::Failed { cause: FailureCause::GuestPanic }];
    let gauges = Gauges {
        states: count(&states.map(|state| state.name())),
        peers: count(&peers.map(|state| state.name())),
        pressure: Pressure { cpu: Some(1.0), memory: Some(1.0), io: Some(1.0) },
        ..Gauges::default()
    };
    let flow = FlowStatus { frames: 1, bytes: 1, dropped: 1, throttled: 1 };
    let interface = InterfaceStatus { index: 0, link_up: true, rx: flow, tx: flow };
    let passed = Passed { interfaces: vec![interface], volumes: vec![VolumeStatus::default()] };
    read(&metrics.text(&gauges, &[(VmId::from_random([1; 10]), passed)]))
}

/// Samples of Prometheus' text. No word in it has a comma or a brace here.
fn read(text: &str) -> Exposed {
    let mut exposed = Exposed::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let series = line.rsplit_once(' ').expect("a sample").0;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let known = exposed.entry(name.to_owned()).or_default();
        for label in labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()) {
            let (label, word) = label.split_once('=').expect("a label");
            known.entry(label.to_owned()).or_default().insert(word.trim_matches('"').to_owned());
        }
    }
    exposed
}

/// A label and the words it may be.
type Matcher = (String, Vec<String>);

/// What an expression names.
#[derive(Debug, Default)]
struct Named {
    /// Metrics, each with its matchers.
    metrics: Vec<(String, Vec<Matcher>)>,
    /// Labels that it groups by.
    labels: Vec<String>,
}

/// What an expression names, as far as our expressions go: everything that is neither a word of the language, nor a
/// number, nor a text is a metric.
fn named(expression: &str) -> Named {
    let mut named = Named::default();
    let mut rest = expression.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        if first == '[' {
            rest = rest.split_once(']').expect("a range that ends").1;
        } else if end == 0 {
            rest = &rest[first.len_utf8()..];
        } else {
            let word = &rest[..end];
            rest = rest[end..].trim_start();
            if BEFORE_LABELS.contains(&word) {
                let (list, after) =
                    rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).expect("a list of labels");
                named.labels.extend(list.split(',').map(|label| label.trim().to_owned()));
                rest = after;
            } else if word == "label_values" {
                // Its last word is a label.
                let (inner, after) =
                    rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).expect("a metric and a label");
                let (metric, label) = inner.split_once(',').expect("a metric and a label");
                named.metrics.push((metric.trim().to_owned(), Vec::new()));
                named.labels.push(label.trim().to_owned());
                rest = after;
            } else if !WORDS.contains(&word) && !first.is_ascii_digit() {
                let mut matchers = Vec::new();
                if let Some((list, after)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
                    matchers.extend(list.split(',').map(matcher));
                    rest = after;
                }
                named.metrics.push((word.to_owned(), matchers));
            }
        }
        rest = rest.trim_start();
    }
    named
}

/// `way="migration"`, `goal=~"launch|enlist"`.
fn matcher(text: &str) -> Matcher {
    let (label, words) = text.split_once('=').expect("a matcher");
    let words = words.trim_start_matches('~').trim_matches('"').split('|').map(str::to_owned).collect();
    (label.trim().to_owned(), words)
}

/// What an expression names that is not there.
fn faults(expression: &str, exposed: &Exposed) -> Vec<String> {
    let named = named(expression);
    let mut faults = Vec::new();
    let mut known: BTreeSet<&str> = OF_PROMETHEUS.into();
    for (metric, matchers) in &named.metrics {
        let Some(labels) = exposed.get(metric) else {
            faults.push(format!("no metric `{metric}` is exposed: {expression}"));
            continue;
        };
        known.extend(labels.keys().map(String::as_str));
        for (label, words) in matchers.iter().filter(|(label, _)| !OF_PROMETHEUS.contains(&label.as_str())) {
            let Some(found) = labels.get(label) else {
                faults.push(format!("`{metric}` has no label `{label}`: {expression}"));
                continue;
            };
            for word in words.iter().filter(|word| CLOSED.contains(&label.as_str()) && !found.contains(*word)) {
                faults.push(format!("`{label}` of `{metric}` is never `{word}`: {expression}"));
            }
        }
    }
    if named.metrics.is_empty() {
        faults.push(format!("it names no metric: {expression}"));
    }
    for label in named.labels.iter().filter(|label| !known.contains(label.as_str())) {
        faults.push(format!("no metric here has a label `{label}`: {expression}"));
    }
    faults
}

/// Expressions of the dashboard: those of its panels, and those that its variables are made of.
fn shown() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    found.extend(value.as_str().filter(|_| name == "expr" || name == "definition").map(str::to_owned));
                    collect(value, found);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("the dashboard is JSON");
    let mut found = Vec::new();
    collect(&dashboard, &mut found);
    found
}

fn list<'a>(yaml: &Yaml<'a>, name: &str) -> Vec<Yaml<'a>> {
    yaml.as_mapping_get(name).and_then(Yaml::as_vec).cloned().unwrap_or_else(|| panic!("no list {name} in {yaml:?}"))
}

#[test]
fn alerts_name_only_what_is_exposed() {
    let exposed = exposed();
    let documents = Yaml::load_from_str(ALERTS).expect("the alerts are YAML");
    assert_eq!(documents.len(), 1);
    let mut names = BTreeSet::new();
    for group in list(&documents[0], "groups") {
        for rule in list(&group, "rules") {
            let text = |yaml: &Yaml, name: &str| {
                let found = yaml.as_mapping_get(name).and_then(|found| found.as_str());
                found.unwrap_or_else(|| panic!("no {name} in {rule:?}")).to_owned()
            };
            let part = |name: &str| rule.as_mapping_get(name).cloned().expect("a part of a rule");
            assert!(names.insert(text(&rule, "alert")), "{rule:?} is there twice");
            assert!(["warning", "critical"].contains(&text(&part("labels"), "severity").as_str()), "{rule:?}");
            assert!(!text(&part("annotations"), "summary").is_empty(), "{rule:?}");
            assert!(!text(&part("annotations"), "description").is_empty(), "{rule:?}");
            assert_eq!(faults(&text(&rule, "expr"), &exposed), Vec::<String>::new());
        }
    }
    assert!(names.len() > 15, "{names:?}");
}

#[test]
fn panels_name_only_what_is_exposed_and_all_of_it() {
    let exposed = exposed();
    let shown = shown();
    for expression in &shown {
        assert_eq!(faults(expression, &exposed), Vec::<String>::new());
    }
    let named: BTreeSet<String> =
        shown.iter().flat_map(|expression| named(expression).metrics).map(|(name, _)| name).collect();
    let parts = ["_sum", "_count"];
    let missing: Vec<_> = exposed
        .keys()
        .filter(|name| !named.contains(*name) && !parts.iter().any(|part| name.ends_with(part)))
        .collect();
    assert!(missing.is_empty(), "no panel shows {missing:?}");
}

#[test]
fn what_is_not_there_is_found() {
    let exposed = exposed();
    for (wrong, wanted) in [
        ("hearth_vmz > 0", "no metric `hearth_vmz`"),
        ("rate(hearth_operations[5m])", "no metric `hearth_operations`"),
        ("hearth_vms{stat=\"failed\"}", "no label `stat`"),
        ("hearth_vms{state=\"flailed\"}", "never `flailed`"),
        ("hearth_operations_total{goal=~\"launch|lunch\"}", "never `lunch`"),
        ("sum by (states) (hearth_vms)", "a label `states`"),
        ("label_values(hearth_hosts, instance)", "no metric `hearth_hosts`"),
        ("1 > 2", "names no metric"),
    ] {
        let faults = faults(wrong, &exposed);
        assert!(faults.len() == 1 && faults[0].contains(wanted), "{wrong}: {faults:?}");
    }
}
