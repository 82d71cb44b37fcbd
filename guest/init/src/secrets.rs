//! What programs of the guest say they hold that no copy of the guest is to have: each has a file of its name in one
//! directory, for as long as it holds it. What is in the file is nobody's business. A guest without any pays for a look-up.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;

use hearth_guest_wire::SECRETS_MAX;

use crate::directory;
use crate::identity::failed;
use crate::link::Refusal;
use crate::sys::{self, Errno};

/// Where they are.
const DIRECTORY: &CStr = c"/run/hearth/secrets.d";

/// Their names, in order.
pub(crate) fn names() -> Result<Vec<String>, Refusal> {
    let open = match sys::open_read(DIRECTORY) {
        Ok(open) => open,
        Err(Errno::NOENT) => return Ok(Vec::new()),
        Err(errno) => return Err(failed("look for marks of secrets")(errno)),
    };
    let found = directory::names(&open).map_err(failed("read the marks of secrets"))?;
    // In few bytes of program: there are few of them.
    let mut names: Vec<String> = Vec::new();
    for name in found {
        let name = format!("{}", name.to_bytes().escape_ascii());
        let at = names.partition_point(|other| *other < name);
        names.insert(at, name);
        names.truncate(SECRETS_MAX);
    }
    Ok(names)
}
