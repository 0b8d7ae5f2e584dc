//! Finds the number of the Slurm release: Slurm loads no plugin that was made for another one.

fn main() {
    let paths = ["/usr/include/slurm/slurm_version.h", "/usr/include/slurm/slurm.h"];
    let directory = std::env::var("SLURM_INCLUDE").ok().map(|d| format!("{d}/slurm/slurm_version.h"));
    let number = directory.iter().map(String::as_str).chain(paths).find_map(|path| {
        println!("cargo:rerun-if-changed={path}");
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find(|l| l.starts_with("#define") && l.contains("SLURM_VERSION_NUMBER"))?;
        let value = line.split_once("SLURM_VERSION_NUMBER")?.1.trim();
        if let Some(hex) = value.strip_prefix("0x") {
            return u32::from_str_radix(hex, 16).ok();
        }
        let parts = value.strip_prefix("SLURM_VERSION_NUM(")?.strip_suffix(')')?;
        let parts: Vec<u32> = parts.split(',').filter_map(|p| p.trim().parse().ok()).collect();
        (parts.len() == 3).then(|| parts[0] << 16 | parts[1] << 8 | parts[2])
    });
    let Some(number) = number else {
        panic!("Slurm's headers are not there: install libslurm-dev, or set SLURM_INCLUDE to the directory that holds slurm/slurm_version.h");
    };
    println!("cargo:rustc-env=SLURM_VERSION={number}");
    println!("cargo:rerun-if-env-changed=SLURM_INCLUDE");
}
