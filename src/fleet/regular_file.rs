//! Opens regular files only: a pipe would wait for a writer, and opening a device may have effects.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a regular file.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let check = |found: Metadata| match found.is_file() {
        true => Ok(()),
        false => Err(io::Error::other("it is no file")),
    };
    check(std::fs::metadata(path)?)?;
    // A pipe may stand there by now: opening it would wait for a writer.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    check(file.metadata()?)?;
    Ok(file)
}
