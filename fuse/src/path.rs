//! Following a path through an image, as a process does that has the image's root as its own
//! (path_resolution(7)): symbolic links, absolute ones too, never lead outside.

use crate::error::{Error, Result};

/// Symlinks followed on the way to one file, as the kernel does it.
const LINKS_MAX: u32 = 40;
/// Bytes of a path, at most (PATH_MAX).
const PATH_MAX: usize = 4096;

/// Where one name leads.
pub(crate) enum Step<P> {
    /// To a file that is no link.
    To(P),
    /// To a link with this target.
    Link(Vec<u8>),
    /// Nowhere.
    Missing,
}

/// Follows `path` from `root`. `step` is asked for each name in a place, and told whether it is the last one.
pub(crate) fn follow<P: Copy>(
    root: P,
    path: &[u8],
    mut step: impl FnMut(P, &[u8], bool) -> Result<Step<P>>,
) -> Result<Option<P>> {
    let mut way = Vec::new();
    let mut here = root;
    let mut rest = components(path);
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == b".." {
            here = way.pop().unwrap_or(root);
            continue;
        }
        match step(here, &name, rest.is_empty())? {
            Step::Missing => return Ok(None),
            Step::To(next) => {
                way.push(here);
                here = next;
            }
            Step::Link(target) => {
                links += 1;
                if links > LINKS_MAX || target.len() > PATH_MAX {
                    return Err(Error::Loop);
                }
                if target.first() == Some(&b'/') {
                    way.clear();
                    here = root;
                }
                rest.extend(components(&target));
            }
        }
    }
    Ok(Some(here))
}

/// The names of a path, the last one first; without empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}
