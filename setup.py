"Package metadata. All settings live in settings.ini; edit there, not here."
import shlex
from configparser import ConfigParser
from pathlib import Path
import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

expected = '''lib_name version description keywords author author_email license status min_python git_url
    requirements dev_requirements docs_requirements api_requirements deepspeed_requirements qlora_requirements
    lmms_requirements browser_requirements onnx_requirements serve_requirements xlsx_requirements wandb_requirements trackio_requirements
    tensorboard_requirements explore_requirements console_scripts lmms_eval_models'''.split()
missing = [o for o in expected if o not in cfg]
if missing: raise SystemExit(f'settings.ini lacks {missing}')

lib = cfg['lib_name']
extras = 'dev docs browser api deepspeed qlora lmms onnx serve xlsx explore wandb trackio tensorboard'.split()
licenses = dict(apache2='Apache-2.0')
statuses = ('1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive')
readme = here/'README.md'

setuptools.setup(
    name = lib,
    license = licenses[cfg['license']],
    classifiers = ['Development Status :: ' + statuses[int(cfg['status'])-1]],
    url = cfg['git_url'],
    packages = setuptools.find_packages(include=[lib, f'{lib}.*'], exclude=[f'{lib}._data*']),
    package_data = {lib: ['_data/**/*']},
    install_requires = shlex.split(cfg['requirements']),
    extras_require = {o: shlex.split(cfg[f'{o}_requirements']) for o in extras},
    python_requires = '>=' + cfg['min_python'],
    long_description = readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type = 'text/markdown',
    zip_safe = False,
    entry_points = {
        'console_scripts': shlex.split(cfg['console_scripts']),
        'lmms_eval.models': shlex.split(cfg['lmms_eval_models']),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
    **{o: cfg[o] for o in 'version description keywords author author_email'.split()})
