//! `hearth pool`.

use serde::Serialize;

use super::Error;
use super::call::{Agent, PROMPT};
use super::output::Output;
use super::table::{columns, or_dash};
use crate::api::types::{Pool, PoolList, PoolRequest};
use crate::cli::{PoolCommand, PoolSetArgs};

#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

pub(super) async fn run(agent: &Agent, out: Output, command: PoolCommand) -> Result<(), Error> {
    match command {
        PoolCommand::Set(PoolSetArgs { bundle, size }) => {
            let path = format!("/v1/pools/{}", bundle.as_str());
            let pool: Pool = agent.put(&path, &PoolRequest { size }, PROMPT).await?;
            out.value(&pool, |pool| {
                let ready = if pool.ready < pool.size { "the rest is being made" } else { "all there are to be" };
                format!("{} of {} machines of {} are ready, {ready}", pool.ready, pool.size, called(pool))
            })?;
        }
        PoolCommand::Ls => {
            let list: PoolList = agent.get("/v1/pools").await?;
            out.value(&list, |list| {
                if list.pools.is_empty() {
                    return "no machines are kept ready; `hearth pool set BUNDLE N` does".to_owned();
                }
                columns(&["BUNDLE", "ID", "READY", "SIZE", "CLAIMED", "MISSED", "TROUBLE"], list.pools.iter().map(row))
            })?;
        }
        PoolCommand::Rm { bundle } => {
            agent.delete(&format!("/v1/pools/{}", bundle.as_str()), PROMPT).await?;
            let removed = bundle.as_str();
            out.value(&Removed { removed }, |it| format!("no machines of {} are kept ready any more", it.removed))?;
        }
    }
    Ok(())
}

fn called(pool: &Pool) -> &str {
    pool.name.as_deref().unwrap_or(pool.bundle_id.as_str())
}

fn row(pool: &Pool) -> Vec<String> {
    vec![
        or_dash(pool.name.as_deref()),
        pool.bundle_id.to_string(),
        pool.ready.to_string(),
        pool.size.to_string(),
        pool.claimed.to_string(),
        pool.missed.to_string(),
        or_dash(pool.trouble.as_deref()),
    ]
}
