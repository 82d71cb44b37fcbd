//! `hearth bundle fetch`, `pin` and `unpin`, and `hearth vm memory`.

use std::time::Duration;

use super::Error;
use super::bundle::{BundleError, called};
use super::call::{Agent, PROMPT};
use super::output::{Output, note};
use super::progress::shown;
use super::table::{bytes, or_dash, pairs};
use crate::api::types::{Bundle, BundleFetch, BundleFetchRequest, LaunchMode, VmMemory};
use crate::cli::BundleFetchArgs;

/// How long a source may take for a manifest and state, which come before the answer.
const BEGIN_LIMIT: Duration = Duration::from_secs(120);

/// Time between two looks at a bundle that is on its way.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

pub(super) async fn fetch(agent: &Agent, out: Output, args: BundleFetchArgs) -> Result<(), BundleError> {
    let request = BundleFetchRequest { bundle_id: args.bundle.clone(), from: args.from };
    let title = format!("fetch {}", args.bundle);
    let fetching = async {
        let mut bundle: Bundle = agent.post("/v1/bundle-fetches", &request, BEGIN_LIMIT).await?;
        let mut told = None;
        while args.wait
            && let Some(fetch) = &bundle.fetch
        {
            if fetch.trouble != told
                && let Some(trouble) = &fetch.trouble
            {
                note(&format!("{} of it are here; the rest does not come: {trouble}", progress(fetch)));
            }
            told = fetch.trouble.clone();
            tokio::time::sleep(LOOK_INTERVAL).await;
            bundle = agent.get(&format!("/v1/bundles/{}", bundle.id)).await?;
        }
        Ok::<_, BundleError>(bundle)
    };
    let bundle = shown(&title, fetching).await?;
    if !out.is_json() {
        note(&match &bundle.fetch {
            None => format!("{} is here", called(&bundle)),
            Some(fetch) => format!(
                "{} is on its way ({}); try: hearth vm launch --bundle {} --lazy",
                called(&bundle),
                progress(fetch),
                bundle.id
            ),
        });
    }
    Ok(out.value(&bundle, |bundle| bundle.id.to_string())?)
}

/// Keeps a bundle, or lets it go.
pub(super) async fn pin(agent: &Agent, out: Output, word: &str, pinned: bool) -> Result<(), BundleError> {
    let path = format!("/v1/bundles/{word}/pin");
    let bundle: Bundle = if pinned {
        agent.put(&path, &super::bundle::Nothing {}, PROMPT).await?
    } else {
        agent.delete_for(&path, PROMPT).await?
    };
    Ok(out.value(&bundle, |bundle| {
        let what = if pinned { "is kept" } else { "goes when others need its room" };
        format!("{} {what}", called(bundle))
    })?)
}

/// How far a bundle is.
pub(super) fn progress(fetch: &BundleFetch) -> String {
    format!("{} of {}", bytes(fetch.fetched_bytes), bytes(fetch.total_bytes))
}

pub(super) async fn memory(agent: &Agent, out: Output, word: &str) -> Result<(), Error> {
    let memory: VmMemory = agent.get(&format!("/v1/vms/{word}/memory")).await?;
    out.value(&memory, |memory| {
        let filling = memory.filling.as_ref();
        let fetch = filling.and_then(|filling| filling.fetch.as_ref());
        pairs([
            ("id", Some(memory.vm_id.to_string())),
            ("bundle", Some(or_dash(memory.bundle_id.as_ref().map(|bundle| bundle.as_str())))),
            (
                "launched",
                memory.mode.map(|mode| match mode {
                    LaunchMode::Mmap => "from all of it".to_owned(),
                    LaunchMode::Lazy => "while it was on its way".to_owned(),
                }),
            ),
            (
                "here",
                Some(filling.map_or_else(
                    || "all of its memory".to_owned(),
                    |filling| format!("{} of {} chunks", filling.chunks_mapped, filling.chunks_total),
                )),
            ),
            (
                "waits for",
                filling.filter(|filling| filling.chunks_wanted > 0).map(|filling| {
                    let since = filling.waits_ms.unwrap_or_default();
                    format!("{} chunks, the first for {since} ms", filling.chunks_wanted)
                }),
            ),
            ("bundle is here", fetch.map(progress)),
            ("comes from", fetch.map(|fetch| fetch.from.clone())),
            ("trouble", fetch.and_then(|fetch| fetch.trouble.clone())),
        ])
    })?;
    Ok(())
}
