//! A configuration without what may be secret: keys that are listed here are shown as they are, of others only that they
//! are there. Pure.

use toml::{Table, Value};

/// What is shown, by section; the section without a name holds what stands outside of sections.
const SHOWN: &[(&str, &[&str])] = &[
    ("", &["host_name", "state_dir", "images_dir", "socket"]),
    (
        "limits",
        &[
            "vms_max",
            "vcpus_max",
            "memory_reserve_mib",
            "disk_reserve_mib",
            "prefault_mib",
            "connections_max",
            "events_kept",
            "events_kept_days",
            "ledger_backups_kept",
        ],
    ),
    ("uids", &["base", "host_number", "quarantine_s"]),
    ("bundles", &["trusted_keys", "trust_local", "fetched_mib"]),
    ("waits", &["guest_ready_s", "vmm_answer_s", "vmm_launch_s", "memory_s"]),
    (
        "fabric",
        &[
            "host_number",
            "ipv6_prefix",
            "ipv4",
            "underlay",
            "vxlan_id",
            "vxlan_port",
            "mtu",
            "quarantine_s",
            "pool",
            "listen",
            "plain_peers",
        ],
    ),
    ("peers", &["name", "address", "host_number"]),
];

/// What stands for a value that is left out.
const LEFT_OUT: &str = "(left out)";

/// The configuration's text without what may be secret. What is not understood is left out whole: an error's text would
/// show a line of it.
pub(super) fn config(text: &str) -> String {
    let Ok(table) = text.parse::<Table>() else {
        return "# the configuration is not TOML, and is left out\n".to_owned();
    };
    let shown: Table = table.into_iter().map(|(key, value)| section(key, value)).collect();
    toml::to_string(&shown).unwrap_or_default()
}

fn is_shown(section: &str, key: &str) -> bool {
    SHOWN.iter().any(|(name, keys)| *name == section && keys.contains(&key))
}

/// One value that stands outside of sections, or one section.
fn section(name: String, value: Value) -> (String, Value) {
    let value = match value {
        Value::Table(table) => Value::Table(redacted(&name, table)),
        Value::Array(all) if all.iter().all(Value::is_table) => {
            let tables = all.into_iter().filter_map(|one| match one {
                Value::Table(table) => Some(Value::Table(redacted(&name, table))),
                Value::String(_)
                | Value::Integer(_)
                | Value::Float(_)
                | Value::Boolean(_)
                | Value::Datetime(_)
                | Value::Array(_) => None,
            });
            Value::Array(tables.collect())
        }
        other if is_shown("", &name) => plain(other),
        Value::String(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::Boolean(_)
        | Value::Datetime(_)
        | Value::Array(_) => LEFT_OUT.into(),
    };
    (name, value)
}

fn redacted(section: &str, table: Table) -> Table {
    let shown = |(key, value): (String, Value)| {
        let value = if is_shown(section, &key) { plain(value) } else { LEFT_OUT.into() };
        (key, value)
    };
    table.into_iter().map(shown).collect()
}

/// A value that is a single one; what holds others has keys that are not listed.
fn plain(value: Value) -> Value {
    match value {
        Value::String(_) | Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => value,
        Value::Array(_) | Value::Table(_) => LEFT_OUT.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_left_out() {
        let text = "host_name = 'a'\ntoken = 'planted'\n[limits]\nvms_max = 5\nsecret = 'planted'\n[fabric]\n\
                    host_number = 3\nkey_file = '/planted'\nlisten = { planted = 1 }\n[[peers]]\nname = 'b'\n\
                    key = 'planted'\n[planted_not]\nx = 'planted'\n";
        let shown = config(text);
        for wanted in
            ["host_name = \"a\"", "vms_max = 5", "host_number = 3", "name = \"b\"", "key_file = \"(left out)\""]
        {
            assert!(shown.contains(wanted), "{wanted}: {shown}");
        }
        assert!(!shown.replace("planted_not", "").contains("planted"), "{shown}");
        assert!(!config("key = 'planted' oops").contains("planted"));
    }
}
