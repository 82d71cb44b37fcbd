//! Tests of `bundle::admit`.

use proptest::prelude::*;

use super::*;
use crate::bundle::manifest::{MemoryMap, StateFile};
use crate::bundle::samples;

fn manifest() -> Manifest {
    let memory = MemoryMap { chunk_bytes: 1 << 18, chunks: Vec::new(), zero_runs: Vec::new(), pages: None };
    samples::draft(1 << 20).complete(memory, StateFile::default(), None)
}

/// A host just like the one the bundle was made on.
fn host(made: &Manifest) -> HostFacts {
    HostFacts {
        arch: made.arch,
        provider: made.host.provider.clone(),
        kernel_mode_emulated: made.host.kernel_mode_emulated,
        cpuid_honoured: made.host.cpuid_honoured,
        tsc_khz: made.host.tsc_khz,
        tsc_scaling: false,
        cpu_vendor: made.cpu.vendor.clone(),
        cpu_features: made.cpu.features.iter().cloned().collect(),
        layout_version: made.machine.layout_version,
        agent_protocols: made.guest.agent_protocol - 1..=made.guest.agent_protocol,
        backings: vec![made.machine.backing],
    }
}

fn facts(change: impl FnOnce(&mut HostFacts)) -> Vec<&'static str> {
    let needs = manifest();
    let mut host = host(&needs);
    change(&mut host);
    match admit(&needs, &host) {
        Ok(()) => Vec::new(),
        Err(error) => error.differences.iter().map(|it| it.fact).collect(),
    }
}

#[test]
fn each_fact_that_differs_is_named() {
    assert_eq!(facts(|host| host.arch = Arch::Aarch64), ["arch"]);
    assert_eq!(facts(|host| host.provider = "Other".to_owned()), ["provider"]);
    assert_eq!(facts(|host| host.kernel_mode_emulated = true), ["kernel_mode"]);
    assert_eq!(facts(|host| host.cpuid_honoured = false), ["cpuid"]);
    assert_eq!(facts(|host| host.cpu_vendor = "AuthenticAMD".to_owned()), ["cpu_vendor"]);
    assert_eq!(facts(|host| host.cpu_features.retain(|name| name != "avx2")), ["cpu_features"]);
    assert_eq!(facts(|host| host.layout_version = 2), ["layout_version"]);
    assert_eq!(facts(|host| host.agent_protocols = 3..=4), ["agent_protocol"]);
    assert_eq!(facts(|host| host.backings = vec![Backing::SharedMemfd]), ["memory_backing"]);
    assert_eq!(
        facts(|host| {
            host.provider.clear();
            host.cpu_features.clear();
        }),
        ["provider", "cpu_features"],
        "all of them at once"
    );
    let needs = Manifest { format: 2, ..manifest() };
    assert_eq!(admit(&needs, &host(&needs)).unwrap_err().differences[0].fact, "format");
}

#[test]
fn the_clock_may_differ_a_little_or_be_scaled() {
    // 250 millionths of 2.4 GHz are 600 kHz.
    assert_eq!(facts(|host| host.tsc_khz += 600), [""; 0]);
    assert_eq!(facts(|host| host.tsc_khz -= 600), [""; 0]);
    assert_eq!(facts(|host| host.tsc_khz += 601), ["tsc_khz"]);
    assert_eq!(facts(|host| (host.tsc_khz, host.tsc_scaling) = (1_000_000, true)), [""; 0]);
}

#[test]
fn a_refusal_says_what_and_what_instead() {
    let needs = manifest();
    let mut host = host(&needs);
    host.cpu_features.remove("aes");
    host.cpu_features.remove("avx2");
    let text = admit(&needs, &host).unwrap_err().to_string();
    assert_eq!(text, "this host differs: cpu_features: aes avx2 is needed, the host has none of these");
}

proptest! {
    #[test]
    fn a_host_admits_what_was_made_on_it_and_more_features_never_refuse(
        features in proptest::collection::btree_set("[a-z0-9_]{1,8}", 0..8),
        more in proptest::collection::btree_set("[a-z0-9_]{1,8}", 0..8),
        tsc_khz: u32,
        emulated: bool,
    ) {
        let mut needs = manifest();
        needs.cpu.features = features.into_iter().collect();
        needs.host.tsc_khz = tsc_khz;
        needs.host.kernel_mode_emulated = emulated;
        let mut host = host(&needs);
        prop_assert_eq!(admit(&needs, &host), Ok(()));
        host.cpu_features.extend(more);
        prop_assert_eq!(admit(&needs, &host), Ok(()));
    }
}
