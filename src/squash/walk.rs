//! Paths in a [`Tree`] as the kernel walks them when the tree is `/` (`path_resolution(7)`): links are followed, and no
//! link leads outside, because there is no outside.

use anyhow::{Result, bail};

use super::{Attributes, Kind, Node, NodeId, Tree};

/// Links that one path may lead through, as in the kernel.
const MAX_LINKS: usize = 40;

/// Longest path of a file, in bytes: what the kernel accepts.
pub const MAX_PATH: usize = 4095;

/// What a path of directories leads to when a part of it is missing.
#[derive(Debug, Clone, Copy)]
pub enum Missing<'a> {
    /// Nothing.
    Fail,
    /// Directories with these attributes.
    Create(&'a Attributes),
}

impl Tree {
    /// The directory at a path, whose links are followed, and the way to it: its ancestors from the root, itself last. `None`
    /// when a part of the path is missing.
    ///
    /// # Errors
    /// When something on the way is no directory, for links in circles, and for paths that are too long.
    pub fn directory(&mut self, path: &[u8], missing: Missing) -> Result<Option<Vec<NodeId>>> {
        let mut way = vec![Tree::ROOT];
        let mut lens = vec![0];
        let mut todo: Vec<Vec<u8>> = parts(path);
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                    lens.pop();
                }
                continue;
            }
            let at = way.last().copied().unwrap_or(Tree::ROOT);
            let len = lens.last().copied().unwrap_or(0) + part.len() + 1;
            if len > MAX_PATH {
                bail!("its path is longer than {MAX_PATH} bytes");
            }
            let id = match (self.child(at, &part), missing) {
                (Some(id), _) => id,
                (None, Missing::Fail) => return Ok(None),
                (None, Missing::Create(attributes)) => self.add(at, &part, empty(attributes))?,
            };
            match &self.node(id).kind {
                Kind::Directory(_) => {
                    way.push(id);
                    lens.push(len);
                }
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        bail!("its path leads through more than {MAX_LINKS} symbolic links");
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                        lens.truncate(1);
                    }
                    todo.extend(parts(target));
                }
                _ => bail!(
                    "{:?} in its path is no directory",
                    String::from_utf8_lossy(&part)
                ),
            }
        }
        Ok(Some(way))
    }
}

fn empty(attributes: &Attributes) -> Node {
    Node {
        attributes: attributes.clone(),
        kind: Kind::Directory(std::collections::BTreeMap::new()),
    }
}

/// The parts of a path, the last one first.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::new(Attributes::default());
        let attributes = Attributes::default();
        let way = tree
            .directory(b"usr/lib/deep", Missing::Create(&attributes))
            .unwrap();
        assert_eq!(way.unwrap().len(), 4);
        for (name, target) in [
            ("lib", "usr/lib"),
            ("abs", "/usr/../../../usr/lib"),
            ("loop", "loop"),
            ("gone", "/no/where"),
        ] {
            let node = Node {
                attributes: Attributes::default(),
                kind: Kind::Symlink(target.into()),
            };
            tree.add(Tree::ROOT, name.as_bytes(), node).unwrap();
        }
        tree
    }

    #[test]
    fn links_lead_within_the_tree() {
        let mut tree = tree();
        let deep = tree.lookup(b"usr/lib/deep");
        assert!(deep.is_some());
        for path in [
            "lib/deep",
            "/abs/deep",
            "./lib/../lib/deep/.",
            "lib/deep/../deep",
        ] {
            let way = tree
                .directory(path.as_bytes(), Missing::Fail)
                .unwrap()
                .unwrap();
            assert_eq!(way.last().copied(), deep, "{path}");
        }
    }

    #[test]
    fn what_is_missing_is_made_behind_a_link() {
        let mut tree = tree();
        assert!(tree.directory(b"gone/x", Missing::Fail).unwrap().is_none());
        let attributes = Attributes::default();
        tree.directory(b"gone/x", Missing::Create(&attributes))
            .unwrap();
        assert!(tree.lookup(b"no/where/x").is_some());
    }

    #[test]
    fn circles_and_depths_are_errors() {
        let mut tree = tree();
        assert!(tree.directory(b"loop/x", Missing::Fail).is_err());
        let deep = "x/".repeat(3000);
        let attributes = Attributes::default();
        let error = tree.directory(deep.as_bytes(), Missing::Create(&attributes));
        assert!(error.unwrap_err().to_string().contains("longer than"));
    }
}
