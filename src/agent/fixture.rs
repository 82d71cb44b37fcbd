//! Records for tests. A record is read as an older agent wrote it, so a field that is added is no change here.

use super::record::VmRecord;
use crate::ids::VmId;

/// A VM that is being launched.
pub(crate) fn vm(number: u8, name: &str) -> VmRecord {
    let record = serde_json::json!({
        "schema_version": 1,
        "id": VmId::from_random([number; 10]),
        "name": name,
        "state": { "state": "launching" },
        "revision": 1,
        "spec": { "image": "demo", "vcpus": 1, "memory_mib": 128, "disks": [] },
        "generation": "00".repeat(16),
        "uid": 1000 + u32::from(number),
        "jail": number,
        "nonce": crate::wire::control::Nonce([number; 16]),
        "process": null,
        "operation": null,
        "created_at": 7,
        "timings": {},
        "remains": null,
    });
    serde_json::from_value(record).expect("a record of an older agent")
}
